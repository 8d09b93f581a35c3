"""Routers and small models of the installed `transformers`, for the tests and for the table in the documentation.

`router_classes()` reads the modelling files as text, so that a new family is found when transformers is updated, and
`router_case()` builds one router of a class from its family's own configuration, shrunk.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dsv3.balance import find_routers, install_biases

HIDDEN, EXPERTS, CHOSEN, TOKENS = 16, 8, 2, 63
# Names of sizes in configurations. One that is there gets the small value; those of CHOICE also in place of None.
CHOICE = {
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "top_k_experts": CHOSEN,
    "n_group": 2,
    "topk_group": 1,
}
SMALL = CHOICE | {
    "hidden_size": HIDDEN,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "intermediate_size_mlp": 8,
    "ffn_hidden_size": 8,
    "expert_ffn_hidden_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "moe_latent_size": 8,
    "moe_num_experts": EXPERTS,
    "moe_topk": CHOSEN,
    "moe_top_k": CHOSEN,
    "moe_k": CHOSEN,
    "zero_expert_num": 3,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "vocab_size": 32,
    "use_expert_bias": True,
    "router_hidden_size": 8,
}
IS_ROUTER = re.compile(r"^class (\w+(?:Router|Gate|Gating))\(", re.M)


@dataclass
class RouterCase:
    """One router class of `transformers`, built.

    Attributes:
        family: Folder of the modelling file.
        cls: The class.
        router: An instance with random weights.
        block: The MoE block that holds it, if that could be built.
    """

    family: str
    cls: type[nn.Module]
    router: nn.Module
    block: nn.Module | None

    @property
    def name(self) -> str:
        return f"{self.family}-{self.cls.__name__}"

    @property
    def root(self) -> nn.Module:
        return self.block if self.block is not None else self.router

    def call(self, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Any:
        """Run the router on random input and return its output, through the block where that passes the bias."""
        x = torch.randn(1, tokens, HIDDEN).to(dtype)
        parameters = list(inspect.signature(self.router.forward).parameters)
        if self.block is not None and {"expert_bias", "e_score_correction_bias"} & set(parameters):
            seen: list[Any] = []
            handle = self.router.register_forward_hook(lambda module, args, output: seen.append(output))
            self.block(x)
            handle.remove()
            return seen[0]
        return self.router(x if "router_states" in parameters else x[0])


def modelling_files() -> list[Path]:
    return sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))


@functools.cache
def router_classes() -> tuple[tuple[str, str, str], ...]:
    """Return (family, module name, class name) of everything named Router or Gate."""
    return tuple(
        (path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}", match)
        for path in modelling_files()
        for match in IS_ROUTER.findall(path.read_text(encoding="utf-8"))
    )


def configurations(family: str) -> list[Any]:
    """Return the family's configurations, shrunk, those of text models first."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob(f"models/{family}/configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and cls.__name__.endswith("Config"):
                found.append(shrunk(cls()))
    return sorted(found, key=lambda config: "Text" not in type(config).__name__)


def shrunk(config: Any) -> Any:
    if "num_local_experts" in (getattr(config, "per_layer_attributes", None) or ()):  # layer 1 is built
        config.per_layer_config = {1: {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}}
    for name, value in SMALL.items():
        try:
            present = getattr(config, name)
        except (AttributeError, RuntimeError):
            continue
        if isinstance(present, list):  # one size for text, one for images; or one per layer
            setattr(config, name, [value] * len(present))
        elif present is not None or name in CHOICE:
            setattr(config, name, value)
    return config


def build(cls: type[nn.Module], configs: list[Any], **more: Any) -> nn.Module | None:
    """Return an instance from the first configuration that has what the class reads."""
    parameters = inspect.signature(cls.__init__).parameters
    arguments = {"layer_idx": 1, "intermediate_size": 8} | more
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    wanted = str(parameters["config"].annotation) if "config" in parameters else ""
    for config in sorted(configs, key=lambda config: type(config).__name__ not in wanted):
        try:
            return cls(config, **arguments)
        except (AttributeError, TypeError, KeyError, IndexError, RuntimeError):
            continue
    return None


def build_block(module: Any, router_name: str, configs: list[Any]) -> nn.Module | None:
    """Return the smallest module of the file that makes a router of this class for itself."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and f"= {router_name}(" in ast.unparse(node) and node.name != router_name:
            block = build(getattr(module, node.name), configs)
            if block is not None:
                return block
    return None


def router_case(family: str, module_name: str, class_name: str, with_block: bool = True) -> RouterCase | None:
    """Build one; None for a class that has no configuration of experts (gates of attention, of detectors)."""
    torch.manual_seed(0)
    module = importlib.import_module(module_name)
    cls = getattr(module, class_name)
    configs = configurations(family)
    block = build_block(module, class_name, configs) if with_block else None
    inside = [child for child in block.modules() if type(child) is cls] if block is not None else []
    router = inside[0] if inside else build(cls, configs)
    if router is None:
        return None
    fill(block if inside else router)
    return RouterCase(family, cls, router, block if inside else None)


@torch.no_grad()
def fill(module: nn.Module | None) -> None:
    """Give random values to weights, which a bare module leaves empty or 0; and 0 to biases of the choice."""
    assert module is not None
    for name, parameter in module.named_parameters():
        if name.endswith(("expert_bias", "e_score_correction_bias")):
            parameter.zero_()
        elif parameter.dim() > 1:
            parameter.normal_(std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith(("expert_bias", "e_score_correction_bias")):
            buffer.zero_()


def source(cls: type[nn.Module]) -> str:
    return inspect.getsource(cls)


def says_bias(entry: tuple[str, str, str]) -> bool:
    """Return whether the source of a router class speaks of a bias of the choice."""
    text = source(getattr(importlib.import_module(entry[1]), entry[2]))
    return any(word in text for word in ("e_score_correction_bias", "expert_bias", "moe_statics"))


def bias_name(holder: nn.Module) -> str:
    tensors = [*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)]
    [name] = [name for name, _ in tensors if name in ("expert_bias", "e_score_correction_bias")]
    return name


@dataclass(frozen=True)
class FamilyRow:
    """One router class in the table of families.

    Attributes:
        family: Folder of the modelling file.
        router: The class.
        bias: Where the bias is, ``Class.attribute``; empty without one.
        status: ``attached``, ``install_bias=True``, ``refused`` (by an error), ``measured only`` (no bias can be
            given), or ``passed over`` (nothing is chosen there, or by a fixed table).
    """

    family: str
    router: str
    bias: str
    status: str


def family_table() -> list[FamilyRow]:
    """Return a row for every class named Router, Gate or Gating in the installed transformers, found by trying."""
    return [family_row(entry) for entry in router_classes()]


def family_row(entry: tuple[str, str, str]) -> FamilyRow:
    family, _, name = entry
    case = router_case(*entry)
    if case is None:
        return FamilyRow(family, name, "", "passed over")
    try:
        routers = [router for router in find_routers(case.root) if router.module is case.router]
    except MisconfigurationException:
        return FamilyRow(family, name, "", "refused")
    if not routers:
        return FamilyRow(family, name, "", "passed over")
    if routers[0].bias_tensor is not None:
        home = f"{type(routers[0].holder).__name__}.{bias_name(routers[0].holder)}"
        return FamilyRow(family, name, home, "attached")
    try:
        install_biases(case.root)
    except MisconfigurationException:
        return FamilyRow(family, name, "", "measured only")
    return FamilyRow(family, name, "", "install_bias=True")
