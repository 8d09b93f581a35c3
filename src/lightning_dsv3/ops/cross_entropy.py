"""Cross entropy of a linear head without its logits in memory.

Logits of T tokens and V ids in float32 are the largest tensor of a step (4096 x 129280 x 4 bytes = 2.1 GB), so they are
made in chunks of rows, and each chunk's gradient with respect to hidden states and head is taken while it is there. The
backward pass then only multiplies by the loss's own gradient: no logits are kept and none are computed twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 22  # logits alive at once, float32: 16 MB, which fits a CPU's last-level cache


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
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
        loss, token_losses = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, denominator, needs_grad)
    return HeadLoss(loss, token_losses)


def count_targets(targets_N: Tensor) -> Tensor:
    """Return the number of targets that are not ignored, at least 1, as float32 scalar."""
    return (targets_N != IGNORE_INDEX).sum().clamp(min=1).to(torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, denominator, needs_grad):  # type: ignore[no-untyped-def]
        rows = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0])
        token_losses = torch.empty(hidden_ND.shape[0], dtype=_accumulation_dtype(hidden_ND), device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if needs_grad else None
        # float32 even for a bfloat16 head: a sum of many chunks in bfloat16 loses the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=token_losses.dtype) if needs_grad else None
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            hidden, targets = hidden_ND[part], targets_N[part]
            log_p = F.log_softmax((hidden @ weight_VD.mT).to(token_losses.dtype), dim=-1)
            ignored = targets == IGNORE_INDEX
            column = targets.masked_fill(ignored, 0).unsqueeze(-1)
            token_losses[part] = -log_p.gather(-1, column).squeeze(-1).masked_fill_(ignored, 0.0)
            if grad_hidden is None or grad_weight is None:
                continue
            grad_logits = log_p.exp_()  # softmax, in the same memory; minus 1 at the target
            grad_logits.scatter_add_(-1, column, torch.full_like(column, -1.0, dtype=log_p.dtype))
            grad_logits = grad_logits.to(hidden.dtype)
            # A row's factor goes to its D hidden values, which are fewer than its V logits.
            factor = (~ignored).to(log_p.dtype).div_(denominator).unsqueeze(-1)
            grad_hidden[part] = (grad_logits @ weight_VD) * factor  # promotes to float32, then rounds once
            scaled = (hidden * factor).to(hidden.dtype)
            if scaled.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.mT, scaled)
            else:
                grad_weight += grad_logits.mT @ scaled
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() / denominator, token_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, (grad_weight * grad_loss).to(ctx.weight_dtype), None, None, None


def _accumulation_dtype(x: Tensor) -> torch.dtype:
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


__all__ = ["IGNORE_INDEX", "HeadLoss", "count_targets", "linear_cross_entropy", "shifted_targets"]
