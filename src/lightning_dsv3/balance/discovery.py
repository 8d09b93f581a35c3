"""Finding the routers of a model, through whatever wraps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dsv3.balance.adapter import DeepSeekV3RouterAdapter, RouterAdapter
from lightning_dsv3.balance.frameworks import FRAMEWORK_ADAPTERS
from lightning_dsv3.balance.hugging_face import HuggingFaceRouterAdapter

NATIVE_ADAPTERS: tuple[RouterAdapter, ...] = (
    DeepSeekV3RouterAdapter(),
    HuggingFaceRouterAdapter(),
    *FRAMEWORK_ADAPTERS,
)
"""The kinds of router that are recognised without being told."""

# Path components that torch.compile, checkpoint_wrapper, FSDP, DDP and DataParallel, and Fabric's `setup` insert. They
# come and go with the strategy, and a layer's name in logs, checkpoints and load files must not. Fabric's wrapper holds
# the model twice: what the strategy has made of it, and as it was given.
_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "module",
        "_forward_module",
        "_original_module",
    }
)
# PEFT trains a copy of a module that is to be saved whole, `<name>.modules_to_save.<adapter>`, and leaves the original
# as `<name>.original_module`, which is not called any more.
_TRAINED_COPY, _UNUSED_ORIGINAL = "modules_to_save", "original_module"


@dataclass(frozen=True, eq=False)
class ObservedRouter:
    """One router of a model.

    Attributes:
        name: Name of the layer in logs and load files, unique in the model.
        path: Dotted path from the root, without wrappers.
        module: The module whose output shows the chosen experts.
        adapter: What knows how to read it.
        num_experts: Number of experts E, with those that compute nothing (identity experts).
        holder: The module that holds the bias: the router, or for example the MoE block around it.
    """

    name: str
    path: str
    module: nn.Module
    adapter: RouterAdapter
    num_experts: int
    holder: nn.Module

    @property
    def bias_tensor(self) -> Tensor | None:
        """The bias as the model holds it, looked up anew: ``.to(...)`` may have put another tensor in its place."""
        return self.adapter.bias(self.holder)

    @property
    def bias(self) -> Tensor | None:
        """The bias as a view ``[E]`` that writes through.

        Raises:
            MisconfigurationException: This process holds a part of it only.
        """
        tensor = self.bias_tensor
        return None if tensor is None else self.as_row(tensor)

    def as_row(self, tensor: Tensor) -> Tensor:
        """Return ``bias_tensor`` as a view ``[E]``; see :attr:`bias`."""
        is_sharded = isinstance(tensor, DTensor) and not all(
            placement.is_replicate() for placement in tensor.placements
        )
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if is_sharded or local.numel() != self.num_experts:
            raise MisconfigurationException(
                f"The routing bias of {self.name} ({self.path}) has {local.numel()} of {self.num_experts} values "
                "in this process: it is a parameter that FSDP has sharded. Leave it out: `fully_shard(..., "
                "ignored_params={bias})`, or FSDPStrategy(ignored_states=[bias])."
            )
        return local if local.dim() == 1 else local.detach().view(-1)


def find_routers(root: nn.Module, adapters: Sequence[RouterAdapter] = NATIVE_ADAPTERS) -> list[ObservedRouter]:
    """Return every router below ``root`` that an adapter matches, in the order of the model.

    Args:
        root: Any module; wrappers on the way (DDP, FSDP, checkpoint, compile, Fabric) are looked through.
        adapters: Tried in order; the first that matches a module reads it.

    Returns:
        The routers, each once even if the model holds it at several places; empty if there is none.

    Raises:
        MisconfigurationException: A router is of a kind that cannot be observed.
    """
    found: list[tuple[str, nn.Module, RouterAdapter]] = []
    for full_path, module in root.named_modules():
        adapter = next((adapter for adapter in adapters if adapter.matches(module)), None)
        if adapter is not None and not _is_unused_original(root, full_path):
            if problem := adapter.refusal(module):
                where = _without_wrappers(full_path) or "The model"
                raise MisconfigurationException(f"{where} ({type(module).__name__}) cannot be balanced: {problem}")
            found.append((full_path, module, adapter))

    full_paths = [full_path for full_path, _, _ in found]
    paths = _unique([_without_wrappers(path) for path in full_paths], otherwise=full_paths)
    names = _unique(
        [adapter.layer_name(path) for path, (_, _, adapter) in zip(paths, found, strict=True)],
        otherwise=paths,
    )
    return [
        ObservedRouter(
            name,
            path,
            module,
            adapter,
            adapter.num_experts(module),
            adapter.bias_holder(module, _parent(root, full_path)),
        )
        for name, path, (full_path, module, adapter) in zip(names, paths, found, strict=True)
    ]


def matching_routers(routers: Sequence[ObservedRouter], patterns: Iterable[str]) -> set[str]:
    """Return the names of the routers whose name or path is like one of ``patterns`` (``*`` for any text).

    Raises:
        ValueError: A pattern is like none.
    """
    found: set[str] = set()
    for pattern in patterns:
        like = {router.name for router in routers if fnmatch(router.name, pattern) or fnmatch(router.path, pattern)}
        if not like:
            known = ", ".join(router.name for router in routers)
            raise ValueError(f"No router is like {pattern!r}. The model's routers: {known}.")
        found |= like
    return found


def no_router_message(root: nn.Module, adapters: Sequence[RouterAdapter]) -> str:
    """Return the error text for a model without routers: what was searched, what comes close, the remedy."""
    modules = list(root.named_modules())
    lookalikes = [
        f"{_without_wrappers(path)} ({type(module).__name__})"
        for path, module in modules
        if any(word in type(module).__name__.lower() for word in ("router", "gate", "gating"))
    ]
    hint = f" Looks like a router, but is of an unknown kind: {', '.join(lookalikes[:4])}." if lookalikes else ""
    if len(lookalikes) > 4:
        hint = f"{hint[:-1]}, and {len(lookalikes) - 4} more."
    return (
        f"No router found in {type(root).__name__}: searched its {len(modules)} modules with "
        f"{', '.join(type(adapter).__name__ for adapter in adapters)}.{hint} Describe your router class with "
        "a lightning_dsv3.balance.RouterAdapter and pass it as `routers=[...]`."
    )


def _without_wrappers(path: str) -> str:
    parts = path.split(".")
    copies = {i for i, part in enumerate(parts) if part == _TRAINED_COPY}
    return ".".join(
        part for i, part in enumerate(parts) if part not in _WRAPPERS and i not in copies and i - 1 not in copies
    )


def _parent(root: nn.Module, path: str) -> nn.Module | None:
    parts = path.split(".")
    while parts and (parts[-1] in _WRAPPERS or _TRAINED_COPY in parts[-2:]):
        parts.pop()
    return root.get_submodule(".".join(parts[:-1])) if path and parts else None


def _is_unused_original(root: nn.Module, path: str) -> bool:
    parts = path.split(".")
    if _UNUSED_ORIGINAL not in parts:
        return False
    wrapper = root.get_submodule(".".join(parts[: parts.index(_UNUSED_ORIGINAL)]))
    return bool(getattr(wrapper, _TRAINED_COPY, None))


def _unique(names: list[str], *, otherwise: list[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else other for name, other in zip(names, otherwise, strict=True)]
