"""Counting which experts a model's routers choose, exactly and from outside.

The counts are the whole input of the balance rule, so every way of getting them wrong is closed here:

* They live in one int64 tensor outside the model. A buffer of the model would be overwritten by rank 0 in
  every forward under DDP (``broadcast_buffers``), averaged, or cast to bfloat16.
* A router is counted by a forward hook, in the forward itself: not again when activation checkpointing
  repeats the forward inside the backward, whichever kind of checkpointing it is, and however much of the
  layer is repeated.
* Nothing is counted unless the observer is open, and a training observer ignores routers in ``eval()`` mode:
  sanity checks, validation, and forwards of other callbacks stay out.
* A copy of the model carries the hooks along (``copy.deepcopy`` in an EMA callback). Its forwards are not
  counted.

Counting is one ``scatter_add_`` per router, on the CPU and on a GPU, eager and compiled: ``bincount`` would wait for
the device to learn the largest id, breaks a compiled graph, and on a CPU is slower, as it first looks for the smallest
and the largest. Where a router's kernel has counted on its way and every token is to be counted, that is added instead.
All layers share one tensor, so that one reduction serves them all, whatever their numbers of experts.
A hook runs once per layer, with everything that it needs gone from the caches since the layer before: its cost is the
number of its calls into torch and Python, far more than the counting itself, and it makes as few as it can.

A training observer also notes forwards whose gate values are not all finite, beside the counts: NaN logits choose
experts like any others, so the counts cannot tell. It does so on the device, and where the values are on the CPU in an
eager forward, by reading one number. Who takes the counts decides what to do about it.

With ``num_groups``, each row of the batch belongs to a group (its domain) and the counts are kept by group.
One more row of the table takes what belongs to no group, such as padding, and is dropped at the end.

With a mask of the batch, padded tokens add 0 to the counts. Which of a router's tokens they are is told by their number
and order alone, and a router for which that does not tell is an error, not a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_dsv3.balance.discovery import ObservedRouter
from lightning_dsv3.balance.hugging_face import output_tensors
from lightning_dsv3.balance.ranks import sum_over_ranks


def in_recompute() -> bool:
    """Return whether this forward runs inside a backward, as activation checkpointing repeats it there.

    ``torch.is_grad_enabled()`` cannot tell: in the non-reentrant form it is true in both forwards. A backward
    has a task id, and a real forward has none. The function is private to torch; this is its only use.
    """
    return torch._C._current_graph_task_id() != -1


class RouterObserver:
    """Counts the chosen experts of ``routers`` while it is open.

    Args:
        routers: What to observe, from :func:`~lightning_dsv3.balance.find_routers`.
        training: Count forwards in training mode only. False counts every forward, for validation.
        num_groups: None for one count per expert; otherwise the number of groups of rows.

    Example:
        >>> from lightning_dsv3.balance import find_routers
        >>> from lightning_dsv3.config import DeepSeekV3Config
        >>> from lightning_dsv3.layers.router import Router
        >>> router = Router(DeepSeekV3Config.from_preset("tiny"))
        >>> _ = nn.init.normal_(router.weight)
        >>> observer = RouterObserver(find_routers(router))
        >>> observer.attach()
        >>> observer.start("cpu")
        >>> observer.open()
        >>> _ = router(torch.randn(6, router.weight.shape[1]))
        >>> observer.close()
        >>> [counts_E] = observer.take()
        >>> int(counts_E.sum()) == 6 * router.num_experts_per_tok
        True
    """

    def __init__(
        self, routers: Sequence[ObservedRouter], *, training: bool = True, num_groups: int | None = None
    ) -> None:
        self.routers = list(routers)
        self._training = training
        self._num_groups = num_groups
        self._rows = 1 if num_groups is None else num_groups + 1
        self._sizes = [*(self._rows * router.num_experts for router in self.routers), len(self.routers)]
        self._table: Tensor | None = None
        self._layer_tables: list[Tensor] = []
        self._one = self._ones = torch.ones(1, dtype=torch.int64)
        # The last entries of the table, one per router: forwards with gate values that are not finite.
        self._broken_L = torch.zeros(len(self.routers), dtype=torch.int64)
        self._broken: list[Tensor] = []
        self.broken_forwards: Tensor = self._broken_L
        self._group_B: Tensor | None = None
        self._is_real_BS: Tensor | None = None
        self._is_open = False
        self._is_on_cpu = True
        self._handles: list[Any] = []
        self.num_experts_per_tok: list[int] = [0] * len(self.routers)
        self._only_in_eval = [False] * len(self.routers)

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the routers, before the model is compiled: a hook that comes later is not run."""
        if not self._handles:
            self._handles = [
                router.module.register_forward_hook(self._make_hook(index, router.module))
                for index, router in enumerate(self.routers)
            ]

    def detach(self) -> None:
        """Take the hooks off and close."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._is_open = False

    def start(self, device: torch.device | str) -> None:
        """Make room for the counts on ``device``, set them to 0, and forget which routers have been seen."""
        # A tensor made under inference_mode, where validation hooks run, could not be written to outside of
        # it.
        self._is_on_cpu = torch.device(device).type == "cpu"
        with torch.inference_mode(False):
            self._table = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
            *self._layer_tables, self._broken_L = self._table.split(self._sizes)
            self._broken = list(self._broken_L.unbind())
            self._one = self._ones = torch.ones(1, dtype=torch.int64, device=device)
        self.num_experts_per_tok = [0] * len(self.routers)
        self._only_in_eval = [False] * len(self.routers)

    def open(self, group_B: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Count the forwards from now on.

        Args:
            group_B: Group of each row of the batch, integers ``[B]``, where ``num_groups`` is set. The tokens
                of a router are taken as B rows of equal length, in order. Rows of group -1 are not counted.
            mask: Bools or integers ``[B, S]``, 0 for padding, which is not counted. A router that sees only S - k
                positions per row has not been given the last k tokens as input, as in ``model(ids[:, :-1])``, or puts
                position i and i + k together (MTP at depth k). Either way a position counts if neither i nor i + k is
                padding: exactly the positions that the text has without padding, on whichever side the padding is.
        """
        assert (group_B is None) == (self._num_groups is None), "group_B goes with num_groups"
        if group_B is not None:
            group_B = group_B.to(self._started().device, torch.int64)
            group_B = torch.where(group_B < 0, self._rows - 1, group_B)
        self._group_B = group_B
        self._is_real_BS = None if mask is None else mask.to(self._started().device) != 0
        self._is_open = True

    def close(self) -> None:
        """Count nothing from now on."""
        self._is_open = False

    def snapshot(self) -> Tensor:
        """Return a copy of all counts, for :meth:`restore`."""
        return self._started().clone()

    def restore(self, snapshot: Tensor | None) -> None:
        """Set all counts to those of a snapshot, or to 0.

        Args:
            snapshot: From :meth:`snapshot`; or the counts of all routers in one row, without what comes after them.
        """
        table = self._started()
        if snapshot is None:
            table.zero_()
        else:
            table.zero_()[: snapshot.numel()].copy_(snapshot)

    def take(self, group: Any = None) -> list[Tensor]:
        """Return the counts and start again from 0.

        Afterwards ``broken_forwards``, int64 ``[L]``, says how many of the counted forwards of each router had gate
        values that are not finite (a training observer only).

        Args:
            group: Process group to sum over, with one collective for all layers.

        Returns:
            int64 per router: ``[E]``, or ``[num_groups, E]``.
        """
        counts = sum_over_ranks(self.snapshot(), group)
        self._started().zero_()
        *tables, self.broken_forwards = counts.split(self._sizes)
        return self._without_last_group(tables)

    def split(self, snapshot: Tensor) -> list[Tensor]:
        """Return the counts of a snapshot per router: ``[E]``, or ``[num_groups, E]``."""
        return self._without_last_group(list(snapshot.split(self._sizes)[:-1]))

    def _without_last_group(self, tables: list[Tensor]) -> list[Tensor]:
        if self._num_groups is None:
            return tables
        return [table.view(self._rows, -1)[: self._num_groups] for table in tables]

    def unobserved(self) -> list[str]:
        """Return the routers that have not been counted yet, each with the likely reason."""
        return [
            f"{router.name} ({router.path}): "
            + ("it is in eval() mode; call .train()" if only_in_eval else "its forward was not seen")
            for router, num_chosen, only_in_eval in zip(
                self.routers, self.num_experts_per_tok, self._only_in_eval, strict=True
            )
            if num_chosen == 0
        ]

    def _started(self) -> Tensor:
        assert self._table is not None, "call start() first"
        return self._table

    def _make_hook(self, index: int, observed: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        adapter = self.routers[index].adapter

        def count_chosen_experts(module: nn.Module, args: Any, output: Any) -> None:
            if not self._is_open or module is not observed or in_recompute():
                return
            if self._training and not module.training:
                self._only_in_eval[index] = True
                return
            expert_TK = adapter.chosen_experts(module, output)
            # On a CPU values may be read at once: where there are any, and not what a compiler or a tracer puts there.
            is_readable = self._is_on_cpu and type(expert_TK) is Tensor and not torch.compiler.is_compiling()
            self._count(index, expert_TK, is_readable, adapter.counts(module, output))
            if self._training:
                self._note_broken(index, output, is_readable)

        return count_chosen_experts

    def _count(self, index: int, expert_TK: Tensor, is_readable: bool, counts_E: Tensor | None) -> None:
        num_chosen = expert_TK.shape[-1]
        self.num_experts_per_tok[index] = num_chosen
        table_E = self._layer_tables[index]
        if counts_E is not None and self._group_B is None and self._is_real_BS is None:
            table_E.add_(counts_E.to(table_E.device))
            return
        # scatter_add_ takes int64 ids alone, and those of the table's device.
        if expert_TK.dtype != torch.int64 or expert_TK.device != table_E.device:
            expert_TK = expert_TK.to(table_E.device, torch.int64)
        bins = expert_TK.reshape(-1)
        if self._group_B is None and self._is_real_BS is None:
            table_E.scatter_add_(0, bins, self._ones_for(bins.shape[0], is_readable))
            return
        bins_TK = bins.view(-1, num_chosen)
        if self._group_B is not None:
            bins_TK = bins_TK + self._rows_of_tokens(index, bins_TK.shape[0]) * self.routers[index].num_experts
        ones_TK = self._one.expand(bins_TK.shape)
        if self._is_real_BS is not None:
            ones_TK = ones_TK * self._real_tokens(index, bins_TK.shape[0], self._is_real_BS).unsqueeze(-1)
        table_E.scatter_add_(0, bins_TK.reshape(-1), ones_TK.reshape(-1))

    def _ones_for(self, number: int, is_readable: bool) -> Tensor:
        if not is_readable:
            return self._one.expand(number)
        # On a CPU scatter_add_ takes twice as long with an expanded tensor, and a new one has to be filled.
        if self._ones.shape[0] < number:
            with torch.inference_mode(False):
                self._ones = torch.ones(number, dtype=torch.int64)
        return self._ones if self._ones.shape[0] == number else self._ones[:number]

    def _note_broken(self, index: int, output: Any, is_readable: bool) -> None:
        gate = _gate_values(output)
        if gate is None:
            return
        total = gate.detach().sum(dtype=torch.float32)
        if is_readable:
            if not math.isfinite(total.item()):
                self._broken[index].add_(1)
            return
        # 0 times a finite number is 0, and else NaN.
        self._broken[index].add_((total * 0).ne(0).to(self._broken_L.device))

    def _real_tokens(self, index: int, num_tokens: int, is_real_BS: Tensor) -> Tensor:
        """Return which of a router's tokens are no padding, bool ``[T]``."""
        router = self.routers[index]
        num_rows, length = is_real_BS.shape
        missing = length - num_tokens // max(1, num_rows)
        depth = router.adapter.mtp_depth(router.path)
        if num_tokens != num_rows * (length - missing) or missing not in (0, depth, depth + 1):
            raise MisconfigurationException(
                f"{router.name} ({router.path}) routed {num_tokens} tokens of a batch whose mask is [{num_rows}, "
                f"{length}], so it cannot be told which of them are padding. Put a mask of the tokens that the routers "
                "see into the batch and name it, AuxFreeBalanceCallback(mask_key=...); or, where they see no padding, "
                "or it is to be counted like text, mask_key=None."
            )
        is_real_BS = is_real_BS[:, : length - missing] & is_real_BS[:, missing:]
        return (is_real_BS.T if router.adapter.sequence_first else is_real_BS).flatten()

    def _rows_of_tokens(self, index: int, num_tokens: int) -> Tensor:
        assert self._group_B is not None
        num_rows = self._group_B.numel()
        if num_rows == 0 or num_tokens % num_rows:
            raise ValueError(
                f"{self.routers[index].name} routed {num_tokens} tokens of a batch with {num_rows} rows. "
                "Counting by group needs the same number of tokens in every row; pad the rows, or count "
                "without groups."
            )
        return self._group_B.repeat_interleave(num_tokens // num_rows, output_size=num_tokens).unsqueeze(-1)


def _gate_values(output: Any) -> Tensor | None:
    """Return the smallest floating-point tensor of a router's output that is no vector or number; None without one.

    A NaN logit is the greatest, so its expert is chosen and its gate value is NaN: the gate values, which are the
    smallest of the tensors, tell for all of them.
    """
    gate, smallest = None, 0
    for tensor in output if isinstance(output, tuple) else output_tensors(output):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 1:
            size = tensor.numel()
            if gate is None or size < smallest:
                gate, smallest = tensor, size
    return gate
