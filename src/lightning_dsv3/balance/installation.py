"""Giving a bias to routers that have none (Mixtral, Qwen3-MoE, OLMoE, gpt-oss, ...).

The router's own forward keeps running. Within it, and there alone, the ``topk`` that chooses the experts is answered
differently: the ids are those of the highest ``scores + bias``, and the values are the scores of these experts without
the bias. What the router makes of them, a softmax over the chosen or a normalisation, is its own rule on un-biased
scores, and with a bias of 0 its output is the same bit for bit.

A group-limited router (``deepseek_v2``, ``mistral4``) first chooses groups, by the best scores in each. There the bias
is added as well, as in DeepSeek-V3; experts of excluded groups, which these routers mark with a score of 0, stay
excluded.

The bias is a persistent float32 buffer ``selection_bias`` of the router. The router becomes an instance of a class
derived from its own, with the same name, so that ``isinstance``, copies and state dicts work as before.

Scores are what the router compares: probabilities in most families, logits in some (``gpt_oss``, ``granitemoe``,
``aria``, ``llama4``, ``cohere2_moe``), where a step of the same size does less.

Not every router chooses by one ``topk`` over its scores. So each one is tried on random input when it gets its bias,
and refused by name if it does not do what is said here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dsv3.balance.adapter import RouterAdapter
from lightning_dsv3.balance.discovery import NATIVE_ADAPTERS, ObservedRouter, find_routers
from lightning_dsv3.balance.hugging_face import INSTALLED_BIAS, num_chosen, output_tensors, router_class_name

_TOPK = (torch.topk, Tensor.topk)
_MAX = (torch.max, Tensor.max, torch.amax, Tensor.amax)
_PROBED_TOKENS = 32


def install_biases(root: nn.Module, adapters: Sequence[RouterAdapter] = NATIVE_ADAPTERS) -> list[str]:
    """Give every Hugging Face router below ``root`` that has no bias a bias of 0.

    ``AuxFreeBalanceCallback(install_bias=True)`` does this in its ``setup``. To load a checkpoint of such a run without
    the callback, do it before loading.

    Args:
        root: Any module, with its weights on a device and not yet sharded.
        adapters: What finds the routers.

    Returns:
        Names of the layers that have got one.

    Raises:
        MisconfigurationException: A router does not choose by ``topk`` over its scores.

    Example:
        >>> install_biases(nn.Linear(2, 2))
        []
    """
    installed = []
    for router in find_routers(root, adapters):
        if router.bias_tensor is None and router_class_name(router.module) is not None:
            _install(router)
            installed.append(router.name)
    return installed


def install_biases_before_loading(root: nn.Module, adapters: Sequence[RouterAdapter] = NATIVE_ADAPTERS) -> None:
    """Let ``root`` give its routers a bias also at the moment that a state dict is loaded into it.

    That serves routers that are built late (``configure_model``), and a state dict from before there were biases: what
    it lacks stays as it is.
    """
    root.register_load_state_dict_pre_hook(functools.partial(_before_loading, tuple(adapters)))


def _before_loading(
    adapters: Sequence[RouterAdapter], root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    install_biases(root, adapters)
    for path, module in root.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, _WithInstalledBias):
            state_dict.setdefault(f"{path}.{INSTALLED_BIAS}".lstrip("."), getattr(module, INSTALLED_BIAS))


class _WithInstalledBias(nn.Module):
    """What the derived class of a router has besides the router's own class."""

    own_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the router's own forward with the bias added where experts are chosen."""
        with _BiasedChoice(self):
            return super().forward(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = getattr(self, INSTALLED_BIAS)
        super()._apply(fn, recurse)
        after = getattr(self, INSTALLED_BIAS)
        if after.dtype != torch.float32:  # take the device, keep the dtype
            setattr(self, INSTALLED_BIAS, before.to(device=after.device, dtype=torch.float32))
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the router's own class, as the derived one can be imported from nowhere."""
        return _new_with_bias, (self.own_class,), self.__dict__.copy()


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_with_bias(own_class: type[nn.Module]) -> type[nn.Module]:
    """Return the derived class, the same one for all routers of a class."""
    if own_class not in _classes:
        names = {"__module__": own_class.__module__, "__qualname__": own_class.__qualname__, "own_class": own_class}
        _classes[own_class] = type(own_class.__name__, (_WithInstalledBias, own_class), names)
    return _classes[own_class]


def _new_with_bias(own_class: type[nn.Module]) -> nn.Module:
    cls = _class_with_bias(own_class)
    return cls.__new__(cls)


class _BiasedChoice(TorchFunctionMode):
    """Adds the bias of a router to the scores that its ``topk`` sees."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self._bias_E: Tensor = getattr(router, INSTALLED_BIAS)
        self._num_chosen = num_chosen(router)
        self._num_groups = int(getattr(router, "num_group", None) or 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK:
            return self._topk(*args, **kwargs)
        if func in _MAX and self._is_grouped(args[0]):
            # The best score of each group, which deepseek_v2 compares groups by.
            return func(self._grouped(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _topk(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        if self._is_grouped(input):
            return torch.topk(self._grouped(input), k, dim, largest, sorted)
        if k != self._num_chosen or input.shape[-1] != self._bias_E.numel() or dim not in (-1, input.dim() - 1):
            return torch.topk(input, k, dim, largest, sorted)
        scores = input.detach()
        biased = scores.float() + self._bias_E
        if self._num_groups > 1:
            biased = biased.masked_fill(scores == 0, float("-inf"))
        indices = torch.topk(biased, k, dim, largest, sorted).indices
        return torch.return_types.topk((input.gather(dim, indices), indices))

    def _is_grouped(self, scores: Any) -> bool:
        groups = self._num_groups
        shape = (groups, self._bias_E.numel() // groups)
        return groups > 1 and isinstance(scores, Tensor) and tuple(scores.shape[-2:]) == shape and scores.dim() > 2

    def _grouped(self, scores: Tensor) -> Tensor:
        return scores.detach().float() + self._bias_E.view(self._num_groups, -1)


def _install(router: ObservedRouter) -> None:
    module = router.module
    parameter = next(module.parameters())
    if parameter.is_meta or hasattr(parameter, "placements"):
        raise MisconfigurationException(
            f"{router.name} ({router.path}) cannot get a bias while its weights are on the meta device or sharded. "
            "Call lightning_dsv3.balance.install_biases(model) when the model has been built, before it is wrapped."
        )
    x = _probe_input(router, parameter)
    was_training = module.training
    module.eval()
    before = _run(module, x)
    own_class = type(module)
    bias_E = torch.zeros(router.num_experts, dtype=torch.float32, device=parameter.device)
    module.register_buffer(INSTALLED_BIAS, bias_E)
    module.__class__ = _class_with_bias(own_class)
    problem = _problem(router, x, before)
    module.train(was_training)
    if problem:
        module.__class__ = own_class
        del module._buffers[INSTALLED_BIAS]
        raise MisconfigurationException(
            f"{router.name} ({router.path}, {own_class.__name__}) cannot be given a bias: {problem}. Give the router a "
            "bias of its own and describe it with a lightning_dsv3.balance.RouterAdapter (routers=[...]), or measure "
            "only: AuxFreeBalanceCallback(dry_run=True)."
        )


@torch.no_grad()
def _problem(router: ObservedRouter, x: Tensor, before: list[Tensor]) -> str | None:
    """Return in what the router, which has just got a bias of 0, does not do what it must; None if all is well."""
    module, bias_E = router.module, getattr(router.module, INSTALLED_BIAS)
    if not all(bool(tensor.isfinite().all()) for tensor in before):
        return "its output is not finite, so its weights are not initialised"
    if not all(torch.equal(a, b) for a, b in zip(before, _run(module, x), strict=True)):
        return "its output changes with a bias of 0"
    gates = _gates(router, module(x))
    # A number added to all experts changes no choice, but for ties; it would change gate values that see the bias.
    bias_E.fill_(0.25)
    moved = _gates(router, module(x))
    same_choice_T = ((gates > 0) == (moved > 0)).all(dim=-1)
    bias_E.zero_()
    if not bool(same_choice_T.any()) or not torch.allclose(gates[same_choice_T], moved[same_choice_T], rtol=1e-2):
        return "its gate values follow the bias"
    for expert in (0, router.num_experts - 1):
        bias_E.zero_()[expert] = 1e4
        chosen = router.adapter.chosen_experts(module, module(x))
        bias_E.zero_()
        if not bool((chosen == expert).any(dim=-1).all()):
            return "it does not choose by torch.topk over the scores of all experts"
    return None


def _gates(router: ObservedRouter, output: Any) -> Tensor:
    """Return the gate values by expert, ``[T, E]``, 0 for those that are not chosen."""
    chosen_TK = router.adapter.chosen_experts(router.module, output)
    floats = [tensor for tensor in output_tensors(output) if tensor.is_floating_point()]
    gates = [tensor for tensor in floats if tensor.shape == chosen_TK.shape]
    if not gates:  # llama4: the gate values are there by expert
        return floats[0].float()
    gate_TE = torch.zeros(*chosen_TK.shape[:-1], router.num_experts, device=chosen_TK.device)
    return gate_TE.scatter(-1, chosen_TK.to(torch.int64), gates[0].float())


def _probe_input(router: ObservedRouter, parameter: Tensor) -> Tensor:
    matrices = [p for p in router.module.parameters() if p.dim() == 2 and p.shape[0] == router.num_experts]
    if not matrices:
        raise MisconfigurationException(
            f"{router.name} ({router.path}) cannot be given a bias: it has no matrix [experts, hidden] to try it with."
        )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBED_TOKENS, matrices[0].shape[1], generator=generator)
    return x.to(device=parameter.device, dtype=matrices[0].dtype)


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [tensor.clone() for tensor in output_tensors(module(x.clone()))]
