"""Cross entropy of a linear head without its logits in memory.

Logits of T tokens and V ids in float32 are the largest tensor of a step (4096 x 129280 x 4 bytes = 2.1 GB), so they are
made in chunks of tokens, and each chunk's gradient with respect to hidden states and head is taken while it is there.
The backward pass then only multiplies by the loss's own gradient: no logits are kept and none are computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsv3.ops import liger
from lightning_dsv3.ops.backends import chosen

IGNORE_INDEX = -100
# Logits alive at once, in float32: 8 MB, which a CPU keeps in its cache; on a GPU 1 GB, as its products want many rows.
_CHUNK_ELEMENTS = 1 << 21
_GPU_CHUNK_ELEMENTS = 1 << 28


class HeadLoss(NamedTuple):
    """Loss of one head.

    Attributes:
        loss: Sum of the token losses over ``denominator``, float32 scalar; carries the gradient.
        token_losses: Negative log likelihood in nats of each target, float32 ``[N]``, 0 where ignored; no gradient.
    """

    loss: Tensor
    token_losses: Tensor


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, denominator: Tensor | None = None
) -> HeadLoss:
    """Return the cross entropy of ``hidden @ weight.T`` with targets.

    Args:
        hidden_ND: Hidden states ``[N, D]``.
        weight_VD: Head ``[V, D]``.
        targets_N: Target ids, int64 ``[N]``; -100 is ignored.
        denominator: What the sum is divided by; None for the number of targets that are not ignored. A batch without
            any target has loss 0.

    Returns:
        Loss and token losses; see :class:`HeadLoss`.
    """
    if denominator is None:
        denominator = count_targets(targets_N)
    hidden_ND, weight_VD = head_operands(hidden_ND, weight_VD)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
        # An empty batch is nothing that a kernel could be launched for.
        by_liger = chosen("cross_entropy", hidden_ND) == "liger" and len(hidden_ND) > 0
        form = _LigerLinearCrossEntropy if by_liger else _LinearCrossEntropy
        loss, token_losses = form.apply(hidden_ND, weight_VD, targets_N, denominator, needs_grad)
    return HeadLoss(loss, token_losses)


def count_targets(targets_N: Tensor) -> Tensor:
    """Return the number of targets that are not ignored, at least 1, as float32 scalar."""
    return (targets_N != IGNORE_INDEX).sum().clamp(min=1).to(torch.float32)


def head_operands(*operands: Tensor) -> tuple[Tensor, ...]:
    """Return hidden states and head in the dtype in which autocast multiplies them; as they are, where it is off."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    return tuple(operand.to(torch.get_autocast_dtype(device)) for operand in operands)


def logit_chunks(hidden_ND: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Make the logits of some rows at a time.

    Args:
        hidden_ND: Hidden states ``[N, D]``.
        weight_VD: Head ``[V, D]``, of the same dtype.

    Yields:
        The rows, and their logits ``[V, n]``, at least float32: to be changed at will, and gone at the next chunk.
    """
    num_rows, vocab_size = hidden_ND.shape[0], weight_VD.shape[0]
    elements = _CHUNK_ELEMENTS if hidden_ND.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    columns = max(1, min(num_rows, elements // vocab_size))
    # One piece of memory for every chunk: fresh memory of this size costs more than the softmax in it.
    memory = torch.empty(vocab_size * columns, dtype=accumulation_dtype(hidden_ND), device=hidden_ND.device)
    for start in range(0, num_rows, columns):
        part = slice(start, min(start + columns, num_rows))
        hidden_nD = hidden_ND[part]
        # Tokens are columns: this way round the product reads both operands along their rows.
        yield part, _product(memory[: vocab_size * len(hidden_nD)].view(vocab_size, -1), weight_VD, hidden_nD.mT)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, denominator, needs_grad):  # type: ignore[no-untyped-def]
        wide = accumulation_dtype(hidden_ND)
        token_losses = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if needs_grad else None
        # float32 even for a bfloat16 head: a sum of many chunks in bfloat16 loses the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else None
        for part, z_Vn in logit_chunks(hidden_ND, weight_VD):
            hidden, targets_n = hidden_ND[part], targets_N[part]
            ignored = targets_n == IGNORE_INDEX
            row = targets_n.masked_fill(ignored, 0).unsqueeze(0)
            target_z, largest_z = z_Vn.gather(0, row).squeeze(0), z_Vn.amax(dim=0)
            p_Vn = torch.softmax(z_Vn, 0, out=z_Vn)
            # logsumexp(z) = max z - log max p, and max p is never below 1/V: no target's p, which may be 0, is needed.
            token_losses[part] = (largest_z - p_Vn.amax(dim=0).log() - target_z).masked_fill_(ignored, 0.0)
            if grad_hidden is None or grad_weight is None:
                continue
            p_Vn.scatter_add_(0, row, torch.full_like(row, -1.0, dtype=wide))
            grad_z = p_Vn.to(hidden.dtype)
            # A token's factor goes to its D hidden values, which are fewer than its V logits.
            factor_n1 = (~ignored).to(wide).div_(denominator).unsqueeze(-1)
            grad_hidden[part] = (grad_z.mT @ weight_VD) * factor_n1  # promotes to float32, then rounds once
            scaled = (hidden * factor_n1).to(hidden.dtype)
            if scaled.dtype == wide:
                grad_weight.addmm_(grad_z, scaled)
            else:
                grad_weight += grad_z @ scaled
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() / denominator, token_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, (grad_weight * grad_loss).to(ctx.weight_dtype), None, None, None


class _LigerLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, denominator, needs_grad):  # type: ignore[no-untyped-def]
        token_losses, grad_hidden, grad_weight = liger.linear_cross_entropy_sum(
            hidden_ND, weight_VD, targets_N, IGNORE_INDEX, needs_grad
        )
        ctx.save_for_backward(grad_hidden, grad_weight, denominator)
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() / denominator, token_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, denominator = ctx.saved_tensors
        factor = grad_loss / denominator
        return grad_hidden * factor, grad_weight * factor, None, None, None


def _product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, written into ``out``, which may have a wider dtype."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(a @ b)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which logits and sums over the vocabulary are held: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def shifted_targets(labels_BS: Tensor, shift: int) -> Tensor:
    """Return labels moved ``shift`` places to the left, so that position i holds label i + shift; -100 behind the end.

    Args:
        labels_BS: int64 ``[B, S]``.
        shift: 1 for the main head, k + 1 for MTP depth k.

    Returns:
        int64 ``[B, S]``.
    """
    targets = labels_BS.new_full(labels_BS.shape, IGNORE_INDEX)
    targets[:, : labels_BS.shape[1] - shift] = labels_BS[:, shift:]
    return targets


def mtp_targets(labels_BS: Tensor, depth: int, document_BS: Tensor | None = None) -> Tensor:
    """Return what MTP depth k predicts at each position: label i + k + 1; -100 where there is nothing to predict.

    Args:
        labels_BS: int64 ``[B, S]``.
        depth: k, less than S.
        document_BS: Number of each position's document, int64 ``[B, S]``: a position has no target where token i + k,
            which the module reads, is another document's. None: a row is one text.

    Returns:
        int64 ``[B, S - k]``.
    """
    targets = shifted_targets(labels_BS, depth + 1)[:, :-depth]
    if document_BS is None:
        return targets
    return targets.masked_fill(document_BS[:, depth:] != document_BS[:, :-depth], IGNORE_INDEX)


__all__ = [
    "IGNORE_INDEX",
    "HeadLoss",
    "accumulation_dtype",
    "count_targets",
    "head_operands",
    "linear_cross_entropy",
    "logit_chunks",
    "mtp_targets",
    "shifted_targets",
]
