"""The router as two kernels: from logits to chosen experts, gate values and counts, and back.

One program takes a few tokens, and all between their logits and their gate values stays in registers.

    order    a float32 becomes an int32 that compares as ``torch.topk`` compares floats, NaN above all. Integers have
             no NaN that falls through a comparison, and the smallest int32, which is no float's, marks what is taken
    groups   the experts stand in slots ``[G', E/G']``, both sizes rounded up to powers of two; slots without an expert
             are marked as taken from the start
    top-k    K times: the highest, of equals the first, then mark it
    counts   marked experts of a program, added over programs by integer atomics, whose order does not matter

The choice is that of the plain form but for what is equal there or becomes so by rounding: of equal experts or groups
the first is taken, and torch says nothing of which it takes. Affinities come from the exponential that torch's own
kernels call on a GPU, and an exact division, to keep roundings apart rare. A group's score is added from the highest
affinity down, so that one of three or more may differ in its last bit.

A NaN of a logit or of the bias is taken first, as in torch. A NaN logit makes the gate value of its expert NaN, and all
of its token with softmax or normalisation. Experts of excluded groups, and those with a bias of -inf, come last: they
are taken where K others are lacking.

The backward needs affinities and chosen experts, and no logits. It cannot be differentiated again.

Shapes: T tokens, S slots of a block, G groups, m members of a group, K chosen experts, E experts.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from lightning_dsv3.ops.routing import Routed
from lightning_dsv3.ops.triton.common import INTERP, CompileCase, Config, on_device

# As int32: what no float becomes; -inf; NaN.
_TAKEN = tl.constexpr(-(2**31))
_LOWEST = tl.constexpr(-2139095041)
_NAN = tl.constexpr(2**31 - 1)

# By the slots of a token: tokens of a program, warps. A thread holds at most 16 slots, and where one warp is a whole
# program no step waits for another.
_BLOCKS = {32: (16, 1), 64: (8, 1), 128: (4, 1), 256: (2, 1), 512: (1, 1), 1024: (1, 2), 2048: (1, 4)}


@triton.jit
def _order(x):  # type: ignore[no-untyped-def]
    """Return int32 that compare as the floats do in ``torch.topk``. -0 is below 0, and does not occur here."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _NAN)


@triton.jit
def _exp(x):  # type: ignore[no-untyped-def]
    # tl.exp multiplies by log2(e) first, and what that rounds off grows with x. The interpreter has tl.exp alone.
    if INTERP:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def _affinity(z_TS, is_expert_TS, SOFTMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    if SOFTMAX:
        z_TS = tl.where(is_expert_TS, z_TS, float("-inf"))
        exp_TS = _exp(z_TS - tl.max(z_TS, axis=1)[:, None])
        s_TS = tl.div_rn(exp_TS, tl.sum(exp_TS, axis=1)[:, None] + tl.zeros_like(exp_TS))
    else:
        s_TS = tl.div_rn(tl.full(z_TS.shape, 1.0, tl.float32), 1.0 + _exp(-z_TS))
    return s_TS


@triton.jit
def _exclude_groups(  # type: ignore[no-untyped-def]
    order_TS,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    IN_SCORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Set all but KEPT groups to -inf; their slots without an expert have no number that could be found."""
    order_TGm = tl.reshape(order_TS, [BLOCK_T, BLOCK_G, BLOCK_M])
    member_m = tl.arange(0, BLOCK_M)[None, None, :]
    left_TGm = order_TGm
    score_TG = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    for _ in range(IN_SCORE):
        best_TG = tl.max(left_TGm, axis=2)
        first_TG = tl.min(tl.where(left_TGm == best_TG[:, :, None], member_m, BLOCK_M), axis=2)
        left_TGm = tl.where(member_m == first_TG[:, :, None], _TAKEN, left_TGm)
        bits_TG = tl.where(best_TG < 0, best_TG ^ 0x7FFFFFFF, best_TG)
        score_TG += bits_TG.to(tl.float32, bitcast=True)
    group_G = tl.arange(0, BLOCK_G)[None, :]
    left_TG = tl.where(group_G < G, _order(score_TG), _TAKEN)
    for _ in range(KEPT):
        best_T = tl.max(left_TG, axis=1)
        first_T = tl.min(tl.where(left_TG == best_T[:, None], group_G, BLOCK_G), axis=1)
        left_TG = tl.where(group_G == first_T[:, None], _TAKEN, left_TG)
    kept_TGm = tl.where((left_TG == _TAKEN)[:, :, None], order_TGm, _LOWEST)
    return tl.reshape(kept_TGm, [BLOCK_T, BLOCK_G * BLOCK_M])


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]
    logits_TE,
    bias_E,
    gate_TK,
    expert_TK,
    affinity_TE,
    counts_E,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    IN_SCORE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_T = t_T.to(tl.int64)
    is_token_T = t_T < num_tokens
    slot_S = tl.arange(0, BLOCK_G * BLOCK_M)
    if BLOCK_G * BLOCK_M == E:
        expert_S = slot_S
    else:
        member_S = slot_S % BLOCK_M
        # Slots without an expert have numbers from E on, so that no comparison finds them.
        expert_S = tl.where(member_S < E // G, slot_S // BLOCK_M * (E // G) + member_S, E)
    is_expert_TS = (expert_S < E)[None, :] & tl.full([BLOCK_T, 1], True, tl.int1)
    inside_TS = is_token_T[:, None] & is_expert_TS
    at_TS = row_T[:, None] * E + expert_S[None, :]

    z_TS = tl.load(logits_TE + at_TS, mask=inside_TS, other=0.0)
    s_TS = _affinity(z_TS, is_expert_TS, SOFTMAX)
    tl.store(affinity_TE + at_TS, s_TS, mask=inside_TS)
    choice_TS = s_TS
    if HAS_BIAS:
        choice_TS = s_TS + tl.load(bias_E + expert_S, mask=expert_S < E, other=0.0)[None, :]
    order_TS = tl.where(is_expert_TS, _order(choice_TS), _TAKEN)
    if KEPT < G:
        order_TS = _exclude_groups(order_TS, G, KEPT, IN_SCORE, BLOCK_T, BLOCK_G, BLOCK_M)

    k_K = tl.arange(0, BLOCK_K)[None, :]
    gates_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    experts_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    total_T = tl.zeros([BLOCK_T], tl.float32)
    s_bits_TS = s_TS.to(tl.int32, bitcast=True)
    for k in range(K):
        best_T = tl.max(order_TS, axis=1)
        first_T = tl.min(tl.where(order_TS == best_T[:, None], expert_S[None, :], E), axis=1)
        is_first_TS = expert_S[None, :] == first_T[:, None]
        order_TS = tl.where(is_first_TS, _TAKEN, order_TS)
        # A sum with one number in it, of its bits: a warp adds integers in one step.
        s_T = tl.sum(tl.where(is_first_TS, s_bits_TS, 0), axis=1).to(tl.float32, bitcast=True)
        total_T += s_T
        gates_TK = tl.where(k_K == k, s_T[:, None], gates_TK)
        experts_TK = tl.where(k_K == k, first_T[:, None], experts_TK)

    if NORMALISE:
        gates_TK = tl.div_rn(gates_TK, (total_T + 1e-20)[:, None] + tl.zeros_like(gates_TK))
    at_TK = row_T[:, None] * K + k_K
    inside_TK = is_token_T[:, None] & (k_K < K)
    tl.store(gate_TK + at_TK, gates_TK * scale, mask=inside_TK)
    tl.store(expert_TK + at_TK, experts_TK.to(tl.int64), mask=inside_TK)
    count_S = tl.sum(((order_TS == _TAKEN) & inside_TS).to(tl.int32), axis=0)
    tl.atomic_add(counts_E + expert_S, count_S.to(tl.int64), mask=count_S > 0, sem="relaxed")


@triton.jit
def _route_backward_kernel(  # type: ignore[no-untyped-def]
    grad_gate_TK,
    grad_affinity_TE,
    expert_TK,
    affinity_TE,
    grad_logits_TE,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_AFFINITY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_T = t_T.to(tl.int64)
    is_token_T = t_T < num_tokens
    e_E = tl.arange(0, BLOCK_E)[None, :]
    at_TE = row_T[:, None] * E + e_E
    inside_TE = is_token_T[:, None] & (e_E < E)

    s_TE = tl.load(affinity_TE + at_TE, mask=inside_TE, other=0.0)
    if HAS_AFFINITY:
        grad_s_TE = tl.load(grad_affinity_TE + at_TE, mask=inside_TE, other=0.0)
    else:
        grad_s_TE = tl.zeros_like(s_TE)
    if HAS_GATE:
        if NORMALISE:
            # g = scale * s / total, so that ds = scale * (dg - sum(dg * s) / total) / total
            k_K = tl.arange(0, BLOCK_K)[None, :]
            at_TK = row_T[:, None] * K + k_K
            inside_TK = is_token_T[:, None] & (k_K < K)
            experts_TK = tl.load(expert_TK + at_TK, mask=inside_TK, other=0)
            s_TK = tl.load(affinity_TE + row_T[:, None] * E + experts_TK, mask=inside_TK, other=0.0)
            grad_TK = tl.load(grad_gate_TK + at_TK, mask=inside_TK, other=0.0)
            total_T = tl.sum(s_TK, axis=1) + 1e-20
            mean_T = tl.sum(grad_TK * (s_TK / total_T[:, None]), axis=1)
        for k in range(K):
            expert_T = tl.load(expert_TK + row_T * K + k, mask=is_token_T, other=0)
            grad_T = tl.load(grad_gate_TK + row_T * K + k, mask=is_token_T, other=0.0)
            if NORMALISE:
                grad_T = (grad_T - mean_T) / total_T
            grad_s_TE += tl.where(e_E == expert_T[:, None], (grad_T * scale)[:, None], 0.0)
    if SOFTMAX:
        grad_z_TE = s_TE * (grad_s_TE - tl.sum(s_TE * grad_s_TE, axis=1)[:, None])
    else:
        grad_z_TE = grad_s_TE * ((1.0 - s_TE) * s_TE)
    tl.store(grad_logits_TE + at_TE, grad_z_TE, mask=inside_TE)


class _Rule(NamedTuple):
    """How a layer routes, as its kernels are compiled."""

    E: int
    K: int
    G: int
    KEPT: int
    IN_SCORE: int
    SOFTMAX: int
    NORMALISE: int


@functools.cache
def _forward_config(rule: _Rule, has_bias: bool) -> Config:
    groups, members = triton.next_power_of_2(rule.G), triton.next_power_of_2(rule.E // rule.G)
    tokens, num_warps = _BLOCKS[max(32, groups * members)]
    block = {"BLOCK_T": tokens, "BLOCK_G": groups, "BLOCK_M": members, "BLOCK_K": triton.next_power_of_2(rule.K)}
    return Config({**rule._asdict(), "HAS_BIAS": has_bias, **block}, num_warps)


@functools.cache
def _backward_config(rule: _Rule, has_gate: bool, has_affinity: bool) -> Config:
    experts = triton.next_power_of_2(rule.E)
    tokens, num_warps = _BLOCKS[max(32, experts)]
    block = {"BLOCK_T": tokens, "BLOCK_E": experts, "BLOCK_K": triton.next_power_of_2(rule.K)}
    flags = {"HAS_GATE": has_gate, "HAS_AFFINITY": has_affinity}
    choice = {name: getattr(rule, name) for name in ("E", "K", "SOFTMAX", "NORMALISE")}
    return Config({**choice, **flags, **block}, num_warps)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    experts_in_group_score: int,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Routed:
    """As :func:`lightning_dsv3.ops.routing.route_plain`, in one kernel, and with the counts.

    Args:
        logits_TE: Router logits, float32 ``[T, E]`` with at most 1024 experts.
        bias_E: Routing bias, float32 ``[E]``, or None. No gradient reaches it.
        num_experts_per_tok: K.
        n_group: G.
        topk_group: Groups that a token may use.
        experts_in_group_score: Highest biased affinities in a group's score.
        scoring_func: ``sigmoid`` or ``softmax``.
        norm_topk_prob: Divide gate values by their sum.
        routed_scaling_factor: Factor after normalisation.

    Returns:
        Gate values, chosen experts, affinities and counts. It can be differentiated once.

    Raises:
        ValueError: More experts chosen than there are, or groups of different sizes.
    """
    num_experts = logits_TE.shape[-1]
    if num_experts % n_group or not 0 < num_experts_per_tok <= num_experts:
        raise ValueError(
            f"num_experts_per_tok={num_experts_per_tok} of {num_experts} experts in n_group={n_group}: choose at most "
            "all experts, and make groups of one size"
        )
    if topk_group >= n_group:
        n_group = topk_group = 1
    in_score = min(experts_in_group_score, num_experts // n_group)
    is_softmax = scoring_func == "softmax"
    rule = _Rule(num_experts, num_experts_per_tok, n_group, topk_group, in_score, is_softmax, norm_topk_prob)
    return Routed(*_route(logits_TE, bias_E, list(rule), routed_scaling_factor))


# Registered operators, so that torch.compile and meta tensors take them, with or without a GPU.
@torch.library.custom_op("lightning_dsv3::route", mutates_args=())
def _route(
    logits_TE: Tensor, bias_E: Tensor | None, rule: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gate values, chosen experts, affinities and counts."""
    choice, num_tokens = _Rule(*rule), logits_TE.shape[0]
    logits_TE = logits_TE.contiguous()
    gate_TK, expert_TK, affinity_TE = _empty(logits_TE, choice.K)
    counts_E = torch.zeros(choice.E, dtype=torch.int64, device=logits_TE.device)
    if num_tokens:
        config = _forward_config(choice, bias_E is not None)
        bias_E = logits_TE if bias_E is None else bias_E.to(torch.float32).contiguous()
        with on_device(logits_TE):
            _route_kernel[_grid(num_tokens, config)](
                logits_TE, bias_E, gate_TK, expert_TK, affinity_TE, counts_E, num_tokens, scale, **config.keywords
            )
    return gate_TK, expert_TK, affinity_TE, counts_E


@_route.register_fake
def _(logits_TE: Tensor, bias_E: Tensor | None, rule: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choice = _Rule(*rule)
    return *_empty(logits_TE, choice.K), logits_TE.new_empty(choice.E, dtype=torch.int64)


@torch.library.custom_op("lightning_dsv3::route_backward", mutates_args=())
def _route_backward(
    grad_gate_TK: Tensor | None,
    grad_affinity_TE: Tensor | None,
    expert_TK: Tensor,
    affinity_TE: Tensor,
    rule: list[int],
    scale: float,
) -> Tensor:
    """Return the gradient of the logits."""
    choice, num_tokens = _Rule(*rule), affinity_TE.shape[0]
    grad_logits_TE = torch.empty(affinity_TE.shape, dtype=torch.float32, device=affinity_TE.device)
    if num_tokens:
        config = _backward_config(choice, grad_gate_TK is not None, grad_affinity_TE is not None)
        # An argument that the kernel does not read has to point somewhere.
        grad_gate_TK = affinity_TE if grad_gate_TK is None else grad_gate_TK.contiguous()
        grad_affinity_TE = affinity_TE if grad_affinity_TE is None else grad_affinity_TE.contiguous()
        with on_device(affinity_TE):
            _route_backward_kernel[_grid(num_tokens, config)](
                grad_gate_TK, grad_affinity_TE, expert_TK, affinity_TE, grad_logits_TE, num_tokens, scale,
                **config.keywords,
            )  # fmt: skip
    return grad_logits_TE


@_route_backward.register_fake
def _(
    grad_gate_TK: Tensor | None,
    grad_affinity_TE: Tensor | None,
    expert_TK: Tensor,
    affinity_TE: Tensor,
    rule: list[int],
    scale: float,
) -> Tensor:
    return torch.empty_like(affinity_TE)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, ctx.rule, ctx.scale = inputs
    _, expert_TK, affinity_TE, _ = output
    ctx.save_for_backward(expert_TK, affinity_TE)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_gate_TK: Tensor | None, _: None, grad_affinity_TE: Tensor | None, __: None
) -> tuple[Tensor | None, None, None, None]:
    if grad_gate_TK is None and grad_affinity_TE is None:
        return None, None, None, None
    expert_TK, affinity_TE = ctx.saved_tensors
    grad_TE = _route_backward(grad_gate_TK, grad_affinity_TE, expert_TK, affinity_TE, ctx.rule, ctx.scale)
    return grad_TE, None, None, None


_route.register_autograd(_differentiate, setup_context=_remember)


def _empty(logits_TE: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor, Tensor]:
    shape_TK, device = (logits_TE.shape[0], num_experts_per_tok), logits_TE.device
    gate_TK = torch.empty(shape_TK, dtype=torch.float32, device=device)
    expert_TK = torch.empty(shape_TK, dtype=torch.int64, device=device)
    return gate_TK, expert_TK, torch.empty(logits_TE.shape, dtype=torch.float32, device=device)


def _grid(num_tokens: int, config: Config) -> tuple[int]:
    return (triton.cdiv(num_tokens, config.constexprs["BLOCK_T"]),)


def _compile_cases() -> Iterator[CompileCase]:
    sizes = {"num_tokens": "i32", "scale": "fp32"}
    floats = dict.fromkeys(("logits_TE", "bias_E", "gate_TK", "affinity_TE"), "*fp32")
    forward = {**floats, "expert_TK": "*i64", "counts_E": "*i64", **sizes}
    floats = dict.fromkeys(("grad_gate_TK", "grad_affinity_TE", "affinity_TE", "grad_logits_TE"), "*fp32")
    backward = {**floats, "expert_TK": "*i64", **sizes}
    odd = frozenset({"num_tokens"})
    published = {
        "v3": _Rule(256, 8, 8, 4, 2, 0, 1),
        "v2": _Rule(160, 6, 8, 3, 1, 1, 0),
        "v2_lite": _Rule(64, 6, 1, 1, 1, 1, 0),
    }
    # Each block as full as it gets, with all that the kernels can do.
    full = {f"{slots}_slots": _Rule(slots, 16, 8, 4, 2, 1, 1) for slots in _BLOCKS}
    for name, rule in {**published, **full}.items():
        yield CompileCase(f"forward_{name}", _route_kernel, forward, _forward_config(rule, True), unaligned=odd)
    for name, rule in full.items():
        config = _backward_config(rule, True, True)
        yield CompileCase(f"backward_{name}", _route_backward_kernel, backward, config, unaligned=odd)


COMPILED = list(_compile_cases())
