"""What ``kernel_speed.py`` measures: operands, the work that cannot be avoided, and Transformer Engine's forms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.ops.attention import attention_kernel, causal_attention, latent_heads
from lightning_dsv3.ops.cross_entropy import linear_cross_entropy
from lightning_dsv3.ops.dispatch import DispatchPlan, combine, grouped_matmul, permute, plan_dispatch
from lightning_dsv3.ops.documents import Documents
from lightning_dsv3.ops.norm import rms_norm
from lightning_dsv3.ops.quantize import QuantizedBlocks, dequantize_blocks, quantize_blocks, quantize_with_transpose
from lightning_dsv3.ops.rope import rope_table
from lightning_dsv3.ops.routing import route
from lightning_dsv3.ops.swiglu import swiglu
from lightning_dsv3.parallel.fp8 import convert_to_fp8

Function = Callable[..., Any]


@dataclass(frozen=True)
class Shapes:
    """The widths of a model and its batch."""

    tokens: int
    hidden: int
    experts: int
    chosen: int
    expert_width: int
    groups: int
    chosen_groups: int
    heads: int
    qk_nope: int
    qk_rope: int
    v_width: int
    sequence: int
    vocab: int
    dtype: torch.dtype


@dataclass
class Case:
    """An operation on operands.

    Attributes:
        op: Its name among the kernels.
        name: What it is measured on.
        function: From operands to one output or several.
        operands: Its arguments; gradients are taken of those that require them.
        work: Bytes or operations that no implementation of the forward pass can do without.
        training_factor: What forward and backward need, over the forward pass.
        unit: ``GB/s`` or ``TFLOP/s``.
        ceilings: Names of the ceilings that it is held against, the first that was measured.
        peers: The same by other libraries; they may refuse.
        compared: From what a function returns to what implementations must agree on; None for the outputs themselves.
    """

    op: str
    name: str
    function: Function
    operands: tuple[Any, ...]
    work: float
    training_factor: float = 2.0
    unit: str = "GB/s"
    ceilings: tuple[str, ...] = ("copy GB/s",)
    peers: dict[str, Function] = field(default_factory=dict)
    compared: Callable[[Any], list[Tensor]] | None = None

    @property
    def title(self) -> str:
        return f"{self.op}, {self.name}"

    @property
    def unit_size(self) -> float:
        return 1e9 if self.unit == "GB/s" else 1e12

    @property
    def differentiable(self) -> bool:
        return any(isinstance(operand, Tensor) and operand.requires_grad for operand in self.operands)

    def run(self, function: Function, *, training: bool) -> Any:
        """Call a function; for training, return its first output and the gradients of its operands.

        The gradient of the output is the output itself, so that a square is what is differentiated.
        """
        with torch.set_grad_enabled(training):
            outputs = function(*self.operands)
        if not training:
            return outputs
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        wanted = [operand for operand in self.operands if operand.requires_grad]
        return [first, *torch.autograd.grad(first, wanted, first.detach() if first.dim() else None)]

    def compare(self, result: Any, *, training: bool) -> list[Tensor]:
        """Return what implementations must agree on, in float32 on the CPU; of a training pass the gradients."""
        if training:
            tensors = result[1:]
        elif self.compared is not None:
            tensors = self.compared(result)
        else:
            tensors = [result] if isinstance(result, Tensor) else list(result)
        return [tensor.detach().float().cpu() for tensor in tensors]


def cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Yield every case; its operands are made when its turn comes, and gone at the next."""
    make = Operands(shapes, device)
    yield from quantize_cases(make)
    yield router_case(make)
    expert_TK = torch.rand(shapes.tokens, shapes.experts, device=device).topk(shapes.chosen, dim=-1).indices
    yield from expert_cases(make, expert_TK)
    yield from layer_cases(make)
    yield from attention_cases(make)
    yield from fp8_cases(make, expert_TK)


class Operands:
    """Makes random operands of the wanted widths."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.shapes, self.device = shapes, device

    def __call__(self, *size: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        x = torch.randn(*size, device=self.device, dtype=dtype or self.shapes.dtype)
        return x.requires_grad_(grad)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row."""
        return self.shapes.hidden * self.shapes.dtype.itemsize

    @property
    def product(self) -> dict[str, Any]:
        """What is the same in all cases that are bound by products."""
        return {"unit": "TFLOP/s", "training_factor": 3.0, "ceilings": (f"{_name(self.shapes.dtype)} TFLOP/s",)}


def quantize_cases(make: Operands) -> Iterator[Case]:
    """Yield the rounding of activations and weights to FP8 tiles, compared by what the tiles hold."""
    s = make.shapes
    x_TD = make(s.tokens, s.hidden, grad=False)
    numbers = s.tokens * s.hidden
    for block in ((1, 128), (128, 128), (128, 1)):
        work = s.tokens * make.row_bytes + numbers + 4 * numbers / (block[0] * block[1])

        def run(x: Tensor, block: tuple[int, int] = block) -> QuantizedBlocks:
            return quantize_blocks(x, block)

        def values(blocks: QuantizedBlocks, block: tuple[int, int] = block) -> list[Tensor]:
            return [dequantize_blocks(*blocks, block)]

        yield Case("quantize", f"{block[0]} x {block[1]}", run, (x_TD,), work, compared=values)
    work = s.tokens * make.row_bytes + 2 * numbers * (1 + 4 / 128)
    yield Case(
        "quantize", "and its transpose", quantize_with_transpose, (x_TD,), work,
        compared=lambda both: [dequantize_blocks(*blocks, (1, 128)) for blocks in both],
    )  # fmt: skip


def router_case(make: Operands) -> Case:
    """Return the router of all groups' experts."""
    s = make.shapes
    experts = s.experts * s.groups
    bias_E = 0.1 * make(experts, dtype=torch.float32, grad=False)

    def run(logits_TE: Tensor) -> tuple[Tensor, ...]:
        return route(
            logits_TE, bias_E, num_experts_per_tok=s.chosen, n_group=s.groups, topk_group=s.chosen_groups,
            experts_in_group_score=2, scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
        )  # fmt: skip

    def run_by_te(logits_TE: Tensor) -> Tensor:
        from transformer_engine.pytorch.router import fused_topk_with_score_function  # type: ignore[import-not-found]

        return fused_topk_with_score_function(
            logits_TE, s.chosen, False, s.groups, s.chosen_groups, 2.5, "sigmoid", bias_E
        )[0]

    # Logits in; affinities, gate values and numbers of experts out.
    work = s.tokens * (2 * experts * 4 + s.chosen * 12)
    logits_TE = make(s.tokens, experts, dtype=torch.float32)
    return Case(
        "router", f"{experts} experts", run, (logits_TE,), work, peers={"te": run_by_te},
        # In whatever order an implementation names the chosen ones; Transformer Engine gives zeros beside them.
        compared=lambda out: [(out if isinstance(out, Tensor) else out[0]).sort(descending=True).values[:, : s.chosen]],
    )  # fmt: skip


def expert_cases(make: Operands, expert_TK: Tensor) -> Iterator[Case]:
    """Yield the way to the experts, their product, and the way back."""
    s = make.shapes
    plan: DispatchPlan = plan_dispatch(expert_TK, s.experts)
    pairs = s.tokens * s.chosen
    moved = (s.tokens + pairs) * make.row_bytes

    def permute_by_te(x_TD: Tensor) -> Tensor:
        import transformer_engine.pytorch as te  # type: ignore[import-not-found]

        return te.moe_permute(x_TD, expert_TK.to(torch.int32), pairs, map_type="index")[0]

    yield Case(
        "permute",
        "to the experts",
        lambda x: permute(x, plan),
        (make(s.tokens, s.hidden),),
        moved,
        peers={"te": permute_by_te},
    )
    gate_TK = make(s.tokens, s.chosen, dtype=torch.float32)
    back = (make(pairs, s.hidden), gate_TK)
    yield Case("permute", "and back, weighted", lambda y, gate: combine(y, plan, s.tokens, gate), back, moved)
    flops = 4.0 * pairs * s.hidden * s.expert_width
    operands = (make(pairs, s.hidden), make(s.experts, 2 * s.expert_width, s.hidden))
    yield Case(
        "grouped_matmul",
        f"{s.experts} experts",
        lambda x, w: grouped_matmul(x, w, plan.ends_E),
        operands,
        flops,
        **make.product,
    )


def layer_cases(make: Operands) -> Iterator[Case]:
    """Yield norm, activation and loss."""
    s = make.shapes
    pairs = s.tokens * s.chosen
    operands = (make(s.tokens, s.hidden), make(s.hidden, dtype=torch.float32))
    yield Case("norm", f"{s.hidden} wide", lambda x, w: rms_norm(x, w, 1e-6), operands, 2 * s.tokens * make.row_bytes)
    z_NG = make(pairs, 2 * s.expert_width)
    yield Case("swiglu", f"{s.expert_width} wide", swiglu, (z_NG,), 3 * pairs * s.expert_width * s.dtype.itemsize)
    targets_T = torch.randint(0, s.vocab, (s.tokens,), device=make.device)
    operands = (make(s.tokens, s.hidden), make(s.vocab, s.hidden))
    yield Case(
        "cross_entropy", f"{s.vocab} ids", lambda x, w: linear_cross_entropy(x, w, targets_T).loss, operands,
        2.0 * s.tokens * s.vocab * s.hidden, **make.product,
    )  # fmt: skip


def attention_cases(make: Operands) -> Iterator[Case]:
    """Yield attention of one text, and of a row that holds eight documents."""
    s = make.shapes
    q_dim = s.qk_nope + s.qk_rope
    operands = (
        make(1, s.sequence, s.heads, q_dim), make(1, s.sequence, s.heads, s.qk_nope + s.v_width),
        make(1, s.sequence, s.qk_rope),
    )  # fmt: skip
    position_S = torch.arange(s.sequence, device=make.device)
    cos, sin = rope_table(position_S, dim=s.qk_rope, theta=1e4)
    for count in (1, 8):
        length = s.sequence // count
        number_BS = (position_S // length).unsqueeze(0)
        prepared: dict[str, Documents] = {}  # once for all blocks of a model, so not timed

        def run(q: Tensor, kv: Tensor, k_rope: Tensor, packed: bool = count > 1, number_BS: Tensor = number_BS,
                prepared: dict[str, Documents] = prepared) -> Tensor:  # fmt: skip
            kernel = attention_kernel(q, qk_head_dim=q_dim, v_head_dim=s.v_width, packed=packed)
            documents = None
            if packed:
                if kernel.name not in prepared:
                    prepared[kernel.name] = Documents.prepared(number_BS, kernel.name, q.dtype)
                documents = prepared[kernel.name]
            heads = latent_heads(q, kv, k_rope, cos, sin, v_head_dim=s.v_width, one_width=kernel.one_width)
            return causal_attention(heads, scale=q_dim**-0.5, v_head_dim=s.v_width, documents=documents, kernel=kernel)

        flops = 2.0 * s.heads * (q_dim + s.v_width) * count * length * (length + 1) / 2
        # The backward makes the scores anew, and has four products for the forward's two.
        products = make.product | {"training_factor": 3.5}
        yield Case("attention", "one text" if count == 1 else f"{count} documents", run, operands, flops, **products)


def fp8_cases(make: Operands, expert_TK: Tensor) -> Iterator[Case]:
    """Yield a linear map and experts in FP8, and the same in BF16 as a peer."""
    s = make.shapes
    products = make.product | {"ceilings": ("fp8 TFLOP/s", *make.product["ceilings"])}
    x_TD, gate_TK = make(s.tokens, s.hidden), torch.rand(s.tokens, s.chosen, device=make.device)
    linear = Linear(s.hidden, 2 * s.expert_width).to(make.device)
    experts = Experts(s.experts, s.hidden, s.expert_width).to(make.device)
    for name, module, routing, flops in (
        ("linear", linear, (), 4.0 * s.tokens * s.hidden * s.expert_width),
        ("experts", experts, (gate_TK, expert_TK), 6.0 * s.tokens * s.chosen * s.hidden * s.expert_width),
    ):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        # A copy with the same weights, so that what Transformer Engine keeps beside a module stays.
        in_fp8 = copy.copy(module)
        convert_to_fp8(nn.ModuleList([in_fp8]), backend="auto")
        operands = (x_TD, *module.parameters())
        peers = {"bf16": in_bf16(module, routing)}
        yield Case("fp8", name, in_bf16(in_fp8, routing), operands, flops, **products, peers=peers)


def in_bf16(module: nn.Module, routing: tuple[Any, ...]) -> Function:
    """Return a call of a module under autocast, whose weights are named for their gradients alone."""

    def run(x_TD: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return module(x_TD, *routing)

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
