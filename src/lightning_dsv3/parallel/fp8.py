"""FP8 on a built model, in place: which modules compute their products in FP8, and which stay as they are.

Converted (report, section 3.3.1): the projections of queries, keys and values and the output of attention, the dense
networks, the shared and the routed experts. Never: embedding, output head, routers, norms, the attention operator, and
the projection of an MTP module, which is BF16 in the released weights. A width that is no multiple of 16 stays too, as
the tensor cores' FP8 products ask for that.

A module changes its class and nothing else, as in activation checkpointing: parameters stay in float32 under their
names, so checkpoints of both kinds, and of both backends, fit each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_dsv3.config import ConfigError, did_you_mean
from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.fp8 import FP8_CLASS_OF, FP8Sequential, has_norm_before_linear
from lightning_dsv3.layers.fused_experts import fused_class_of, fused_experts_refusal, plain_class_of_fused
from lightning_dsv3.layers.mtp import MTPModule
from lightning_dsv3.layers.te import MicroBatches, forget_te, set_micro_batches
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.ops.backends import Case, decide, refusals

BACKENDS = ("auto", "te", "emulate")
_PLAIN_CLASS_OF: dict[type[nn.Module], type[nn.Module]] = {fp8: plain for plain, fp8 in FP8_CLASS_OF.items()}
_PLAIN_CLASS_OF[FP8Sequential] = nn.Sequential
_MULTIPLE = 16
# Names under which other models keep what the report leaves in BF16. A module inside a router belongs to it.
_HEADS = ("lm_head", "head", "embed_out", "score", "classifier")
_ROUTERS = ("router", "gate", "shared_expert_gate", "wg")
_MTP_PROJECTIONS = ("eh_proj",)


@dataclass(frozen=True)
class FP8Conversion:
    """What was converted, and what was not.

    Attributes:
        converted: Names of the modules whose products are FP8.
        kept: Name and reason of every other module with a matrix, but for embeddings and norms.
        backend: How the products are computed: as was asked for.
        pow2_scales: Scales of tiles are powers of two.
    """

    converted: tuple[str, ...]
    kept: Mapping[str, str]
    backend: str
    pow2_scales: bool

    def summary(self) -> str:
        """Return some lines for people; numbered modules of one name are counted together."""
        lines = [f"FP8 products ({_told(self.backend)}) in {len(self.converted)} modules:"]
        lines += _grouped(dict.fromkeys(self.converted, ""))
        if self.kept:
            lines += ["as they are:", *_grouped({name: f": {reason}" for name, reason in self.kept.items()})]
        return "\n".join(lines)


def convert_to_fp8(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    backend: str = "auto",
    pow2_scales: bool = True,
) -> FP8Conversion:
    """Let a model's linear maps and experts compute in FP8, wherever the report does.

    Works on our models and on others that are made of ``torch.nn.Linear`` and of the stacked experts of
    ``transformers`` 5. What is converted already stays so, and takes the backend and scales. Under ``torch.autocast``
    activations between the products are in its dtype, else in theirs.

    Args:
        model: Any module; changed in place.
        include: Patterns of names (``*`` for anything), as in ``["blocks.*.feed_forward.*"]``: convert only these.
            None converts all that the report does. What the report keeps cannot be included.
        exclude: Patterns of names that stay.
        backend: ``te``: Transformer Engine, on a Hopper GPU. ``emulate`` rounds both operands to FP8 tiles and
            multiplies in float32, on any device: the numbers of FP8 training, not its speed. ``auto``: ``te`` for
            inputs that it can take, else ``emulate``, said once with the reason; ``kernels.fp8`` forces one.
        pow2_scales: Round the scales of tiles up to powers of two; else they are ``amax / 448`` in float32.

    Returns:
        What was converted and what was not, and why.

    Raises:
        ConfigError: An unknown backend or one that cannot be had here, a pattern that matches nothing or nothing that
            can be converted, or a model in which nothing is left to convert. The model is unchanged then.

    Example:
        >>> from lightning_dsv3 import DeepSeekV3Config
        >>> model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", num_hidden_layers=2))
        >>> conversion = convert_to_fp8(model, exclude=["mtp.*"])
        >>> conversion.converted[:2], conversion.kept["head"]
        (('blocks.0.attention.q.down', 'blocks.0.attention.q.up'), 'output head')
    """
    _check_backend(backend)
    candidates = {name: module for name, module in model.named_modules() if _has_products(module)}
    kept = _kept_by_the_report(model, candidates)
    _check_patterns("exclude", exclude, candidates, {})
    _check_patterns("include", include or (), candidates, kept)
    for name in candidates:
        if name not in kept and _matches(name, exclude):
            kept[name] = "excluded"
        elif name not in kept and include is not None and not _matches(name, include):
            kept[name] = "not included"
    converted = tuple(name for name in candidates if name not in kept)
    if not converted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3]) or "it has no linear map"
        raise ConfigError(
            f"FP8: nothing in {type(model).__name__} can be converted ({reasons}); choose widths that are multiples of "
            f"{_MULTIPLE}, other patterns, or another precision"
        )
    for name in converted:
        module = candidates[name]
        if not is_fp8(module):
            module.__class__ = FP8_CLASS_OF.get(type(module)) or fused_class_of(type(module))
        module.pow2_scales, module.backend = pow2_scales, backend
        forget_te(module)
    for module in model.modules():
        if has_norm_before_linear(module):
            module.__class__ = FP8Sequential
    return FP8Conversion(converted, {name: kept[name] for name in candidates if name in kept}, backend, pow2_scales)


def convert_from_fp8(model: nn.Module) -> nn.Module:
    """Undo :func:`convert_to_fp8`, in place; returns ``model``."""
    for module in model.modules():
        make_plain(module)
    return model


def make_plain(module: nn.Module) -> None:
    """Undo :func:`convert_to_fp8` for one module, not for those inside it."""
    plain = plain_class(module)
    if plain is not None:
        module.__class__ = plain
        forget_te(module)
        for name in ("pow2_scales", "backend"):
            vars(module).pop(name, None)


def is_fp8(module: nn.Module) -> bool:
    """Whether the module itself computes in FP8."""
    return type(module) is not FP8Sequential and plain_class(module) is not None


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that :func:`convert_to_fp8` has changed, None where it has not."""
    return _PLAIN_CLASS_OF.get(type(module)) or plain_class_of_fused(module)


def share_micro_batches(model: nn.Module, micro_batches: MicroBatches) -> None:
    """Let a model's FP8 modules keep what Transformer Engine makes of weights for as long as ``micro_batches`` says."""
    for module in model.modules():
        if is_fp8(module):
            set_micro_batches(module, micro_batches)


# What Transformer Engine would be asked to take on a machine that has it.
_ON_HOPPER = Case("cuda", torch.bfloat16, True)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} of FP8: {did_you_mean(backend, BACKENDS)}")
    if backend == "te" and (reason := refusals("fp8", _ON_HOPPER)["te"]):
        raise ConfigError(
            f"backend='te' of FP8: Transformer Engine cannot be used here ({reason}); emulate computes the same tiles "
            "on any device"
        )


def _told(backend: str) -> str:
    """Return a backend's name, and for ``auto`` what that will be."""
    if backend != "auto":
        return backend
    choice = decide("fp8", _ON_HOPPER)
    return choice.name if choice.name == "te" else f"{choice.name}, as {choice.why}"


def _has_products(module: nn.Module) -> bool:
    """Whether a module is a linear map, or holds the stacked matrices of experts."""
    if isinstance(module, (nn.Linear, Experts)):
        return True
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return not is_convolution and any(p.dim() >= 3 for p in module.parameters(recurse=False))


def _kept_by_the_report(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the reason for each candidate that never computes in FP8."""
    modules = dict(model.named_modules())
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    heads = {id(module.head) for module in modules.values() if isinstance(module, DeepSeekV3)}
    heads |= {id(head) for module in modules.values() if (head := _output_embeddings(module)) is not None}
    projections = {id(module.projection) for module in modules.values() if isinstance(module, MTPModule)}
    kept = {}
    for name, module in candidates.items():
        parts = name.split(".")
        if id(module) in heads or id(getattr(module, "weight", None)) in embeddings or parts[-1] in _HEADS:
            kept[name] = "output head"
        elif any(part in _ROUTERS for part in parts):
            kept[name] = "router"
        elif id(module) in projections or parts[-1] in _MTP_PROJECTIONS:
            kept[name] = "projection of an MTP module"
        elif refusal := _refusal(module):
            kept[name] = refusal
        elif wrong := [width for width in _widths(module) if width % _MULTIPLE]:
            kept[name] = f"width {wrong[0]} is no multiple of {_MULTIPLE}"
    return kept


def _refusal(module: nn.Module) -> str | None:
    """Return why a module has no FP8 form; None where it has."""
    if type(module) in FP8_CLASS_OF or is_fp8(module):
        return None
    return fused_experts_refusal(module)


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    """Return the head that a Hugging Face model names itself."""
    get = getattr(module, "get_output_embeddings", None)
    return get() if callable(get) else None


def _widths(module: nn.Module) -> list[int]:
    if isinstance(module, nn.Linear):
        return [module.in_features, module.out_features]
    down = module.down if isinstance(module, Experts) else module.down_proj
    assert isinstance(down, torch.Tensor)
    return list(down.shape[1:])


def _check_patterns(
    key: str, patterns: Iterable[str], candidates: Mapping[str, nn.Module], kept: Mapping[str, str]
) -> None:
    if isinstance(patterns, str):
        raise ConfigError(f"{key}={patterns!r} of FP8: give a list of patterns, as in [{patterns!r}]")
    for pattern in patterns:
        matched = [name for name in candidates if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                f"{key}={pattern!r} of FP8: matches no linear map or experts; names are dotted, as in "
                f"{', '.join(list(candidates)[:3]) or 'none here'}"
            )
        if all(name in kept for name in matched):
            raise ConfigError(
                f"{key}={pattern!r} of FP8: {matched[0]} stays as it is ({kept[matched[0]]}); leave it out"
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _grouped(text_of_name: Mapping[str, str]) -> list[str]:
    """Return a line for each kind of name and text."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, text in text_of_name.items():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        names.setdefault((pattern, text), []).append(name)
    return [
        f"  {pattern} ({len(same)}){text}" if len(same) > 1 else f"  {same[0]}{text}"
        for (pattern, text), same in names.items()
    ]
