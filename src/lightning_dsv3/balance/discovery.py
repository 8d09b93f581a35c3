"""Finding the routers of a model, through whatever wraps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_dsv3.balance.adapter import NATIVE_ADAPTERS, RouterAdapter

# Path components that torch.compile, checkpoint_wrapper, FSDP, DDP and DataParallel insert. They come and go
# with the strategy, and a layer's name in logs, checkpoints and load files must not.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})


@dataclass(frozen=True, eq=False)
class ObservedRouter:
    """One router of a model.

    Attributes:
        name: Name of the layer in logs and load files, unique in the model.
        path: Dotted path from the root, without wrappers.
        module: The module whose output shows the chosen experts.
        adapter: What knows how to read it.
        num_experts: Number of experts E.
    """

    name: str
    path: str
    module: nn.Module
    adapter: RouterAdapter
    num_experts: int

    @property
    def bias(self) -> Tensor | None:
        """The routing bias, looked up anew, as ``.to(...)`` may have put another tensor in its place."""
        return self.adapter.bias(self.module)


def find_routers(root: nn.Module, adapters: Sequence[RouterAdapter] = NATIVE_ADAPTERS) -> list[ObservedRouter]:
    """Return every router below ``root`` that an adapter matches, in the order of the model.

    Args:
        root: Any module; wrappers on the way (DDP, FSDP, checkpoint, compile) are looked through.
        adapters: Tried in order; the first that matches a module reads it.

    Returns:
        The routers, each once even if the model holds it at several places; empty if there is none.
    """
    found: list[tuple[str, nn.Module, RouterAdapter]] = []
    for full_path, module in root.named_modules():
        adapter = next((adapter for adapter in adapters if adapter.matches(module)), None)
        if adapter is not None:
            found.append((full_path, module, adapter))

    full_paths = [full_path for full_path, _, _ in found]
    paths = _unique([_without_wrappers(path) for path in full_paths], otherwise=full_paths)
    names = _unique(
        [adapter.layer_name(path) for path, (_, _, adapter) in zip(paths, found, strict=True)],
        otherwise=paths,
    )
    return [
        ObservedRouter(name, path, module, adapter, adapter.num_experts(module))
        for name, path, (_, module, adapter) in zip(names, paths, found, strict=True)
    ]


def no_router_message(root: nn.Module, adapters: Sequence[RouterAdapter]) -> str:
    """Return the error text for a model without routers: what was searched, what comes close, the remedy."""
    modules = list(root.named_modules())
    lookalikes = [
        f"{_without_wrappers(path)} ({type(module).__name__})"
        for path, module in modules
        if "router" in type(module).__name__.lower() or "gate" in type(module).__name__.lower()
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
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _unique(names: list[str], *, otherwise: list[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else other for name, other in zip(names, otherwise, strict=True)]
