"""The loaders: an endless training stream that knows where it is, and held-out windows shared out over ranks.

Sample n of the training stream is a pure function of (seed, n): the mixture draws its domain (or, where sources have
weights of their own, its source), and it takes that text's next window. Optimizer step k reads the samples that
:class:`BatchSizes` gives it, k*B .. (k+1)*B - 1 where the batch does not change, whoever reads them:

    sample        0   1   2   3   4   5   6   7        B = 8
    1 process     |-------- micro-batch 0 -----|
    2 ranks       |-- rank 0 ---|-- rank 1 ----|
    accumulate 2  |-- micro 0 --|-- micro 1 ---|       (with 2 ranks each micro-batch is split once more)

So the position of a run is one number, the samples before the optimizer step at hand, beside the number of windows
that each domain has given, which spares counting them again and lets a resumed run change its mixture without reading
anything twice. Only inside a step there is a second one, the micro-batches of it that were used.

Lightning asks for the position in the middle of things: it has fetched one batch ahead, workers have fetched more. The
position is therefore counted in batches that the Trainer has processed, and not in batches that were handed out.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from lightning_dsv3.config import BatchSizes
from lightning_dsv3.data.packing import IGNORED_LABEL, HeldOutWindows, Int64Array, TrainingWindows
from lightning_dsv3.data.sampling import Mixture
from lightning_dsv3.data.tokenizer import EOS_TOKEN_ID

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """How far the training stream has been used.

    Attributes:
        samples: Sequences, over all ranks.
        windows: Of these, how many each domain (or source with a weight of its own) has given.
    """

    samples: int
    windows: tuple[int, ...]

    def moved_to(self, samples: int, mixture: Mixture) -> Position:
        """Return the position at ``samples``, which is not before this one."""
        counts = mixture.counts(self.samples, samples)
        return Position(samples, tuple(int(n) for n in self.windows + counts))


class TrainingStream(IterableDataset[Batch]):
    """One rank's micro-batches of the training stream, without end.

    It is an IterableDataset so that Lightning leaves the order alone. Worker w of W makes the batches w, w + W, ...;
    the loader takes them in turn, so their number changes nothing.

    Args:
        parts: Training windows of each text that has a weight: a domain, or one of its sources.
        mixture: Draws the part of each sample.
        domain_of: The domain that each part belongs to; None if every part is a domain.
        batch_sizes: The samples of every optimizer step; each size divides by ``accumulate * world_size``.
        accumulate: Micro-batches per optimizer step.
        rank: This process.
        world_size: All processes.
        with_documents: Give each batch ``document`` as well.
    """

    def __init__(
        self,
        parts: Sequence[TrainingWindows],
        mixture: Mixture,
        *,
        domain_of: Sequence[int] | None = None,
        batch_sizes: BatchSizes,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        with_documents: bool = False,
    ) -> None:
        self._parts = list(parts)
        self._domain_of = np.arange(len(self._parts)) if domain_of is None else np.asarray(domain_of, dtype=np.int64)
        self.mixture = mixture
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self._batch_sizes = batch_sizes
        self._with_documents = with_documents
        self.begin_at(Position(0, (0,) * len(self._parts)))

    def begin_at(self, start: Position, skipped: int = 0) -> None:
        """Begin with the optimizer step at ``start``, without its first ``skipped`` micro-batches."""
        self.start = start
        self.skipped = skipped
        self._steps = self._batch_sizes.beginning_at(start.samples)

    def samples(self, number: int) -> range:
        """Return the samples that all ranks together use at the ``number``-th micro-batch from the beginning."""
        step, micro_batch = divmod(self.skipped + number, self.accumulate)
        samples = self._steps.samples(step)
        size = len(samples) // self.accumulate
        return samples[micro_batch * size :][:size]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        position = self.start
        for number in itertools.count(first, stride):
            samples = self.samples(number)
            position = position.moved_to(samples.start, self.mixture)
            yield self._batch(position, len(samples) // self.world_size)

    def _batch(self, position: Position, rows: int) -> Batch:
        """Return this rank's share, ``rows`` sequences, of the micro-batch that begins at ``position``."""
        skipped = self.rank * rows
        parts = self.mixture.domains(position.samples, position.samples + skipped + rows)
        mine = parts[skipped:]
        taken = np.asarray(position.windows) + np.bincount(parts[:skipped], minlength=len(self._parts))
        windows, documents = [], []
        for part in mine:
            windows.append(self._parts[part][int(taken[part])])
            if self._with_documents:
                documents.append(self._parts[part].document_numbers(int(taken[part])))
            taken[part] += 1
        input_ids = torch.from_numpy(np.stack(windows))
        domain = torch.from_numpy(self._domain_of[mine])
        # Training windows have no padding: every position is a label.
        batch = {"input_ids": input_ids, "labels": input_ids.clone(), "domain": domain}
        return batch | ({"document": torch.from_numpy(np.stack(documents))} if documents else {})


class FitProgress:
    """What a Trainer's fit loop has done with the batches.

    Args:
        trainer: A Trainer that is fitting.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def batches_done(self) -> int:
        """Micro-batches of this rank that went through a whole training step, since the run's beginning."""
        return int(self._batch_progress.total.processed)

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches per optimizer step."""
        return self.trainer.accumulate_grad_batches

    @property
    def _batch_progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def batches_into_step(self, accumulated: int) -> int:
        """Return how many of ``accumulated`` micro-batches per step are done of the optimizer step at hand."""
        done, limit = int(self._batch_progress.current.processed), self.trainer.limit_train_batches
        # Lightning steps the optimizer at an epoch's last batch, however many there were. The stream has no end, so
        # an epoch has one only by a limit in batches.
        return 0 if isinstance(limit, int) and done >= limit else done % accumulated

    def begin_step(self, accumulated: int) -> None:
        """Restate Lightning's counts of a run that accumulated ``accumulated`` batches, in this run's and whole steps.

        Lightning steps the optimizer at every batch whose count is a multiple of accumulate_grad_batches. With the old
        counts and another number (as on another number of devices) the first step would miss a part of its batches.
        """
        now = self.accumulate_grad_batches
        if accumulated == now and not self.batches_into_step(now):
            return
        for count in (self._batch_progress.total, self._batch_progress.current):
            added = count.processed // accumulated * now - count.processed
            for event in ("ready", "started", "processed", "completed"):
                setattr(count, event, getattr(count, event) + added)


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader over a :class:`TrainingStream` that can say and restore where it is.

    Lightning saves and loads its state with every checkpoint, as it does for any loader with these two methods. Every
    ``iter()`` goes on from the current position.

    Args:
        dataset: The stream.
        identity: What the order of samples depends on, in plain values; a state of another order is told about.
        parts: Lasting names of the stream's parts.
        progress: The training loop that uses the batches. None counts what is handed out, which is right for a plain
            loop over the loader.
        num_workers: Processes that make batches; 0 for none.
        pin_memory: Copy batches to pinned memory.
    """

    def __init__(
        self,
        dataset: TrainingStream,
        *,
        identity: Mapping[str, Any],
        parts: Sequence[str],
        progress: FitProgress | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)
        self.identity = dict(identity)
        self.parts = list(parts)
        self.progress = progress
        self._stream = dataset
        self._handed_out = 0
        self._known = dataset.start
        self._done_before = self._count()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # The stream, and with it every worker, begins where the used batches end.
        self.go_to(*self.place)
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._handed_out += 1
            yield batch

    def _count(self) -> int:
        return self._handed_out if self.progress is None else self.progress.batches_done

    @property
    def place(self) -> tuple[Position, int]:
        """Where the optimizer step at hand begins, and how many of its micro-batches were used."""
        number, accumulate = self._count() - self._done_before, self._stream.accumulate
        if self.progress is None:
            inside = (self._stream.skipped + number) % accumulate
        else:
            inside = self.progress.batches_into_step(accumulate)
        self._known = self._known.moved_to(self._stream.samples(number - inside).start, self._stream.mixture)
        return self._known, inside

    def go_to(self, start: Position, skipped: int = 0) -> None:
        """Go on with the optimizer step at ``start``, without its first ``skipped`` micro-batches."""
        self._stream.begin_at(start, skipped)
        self._known = start
        self._done_before = self._count()

    def state_dict(self) -> dict[str, Any]:
        """Return the place in plain values; it is the same on every rank."""
        position, inside = self.place
        return {
            "samples": position.samples,
            "windows": dict(zip(self.parts, position.windows, strict=True)),
            "batches_into_step": inside,
            "identity": self.identity,
            "accumulate_grad_batches": self._stream.accumulate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; it may come from another number of ranks, micro-batches or workers."""
        saved, accumulated = state["identity"], state["accumulate_grad_batches"]
        # What an older checkpoint does not say is taken for unchanged.
        changed = [key for key, value in self.identity.items() if saved.get(key, value) != value]
        if changed:
            then_and_now = "; ".join(f"{key} was {saved[key]!r} and is {self.identity[key]!r}" for key in changed)
            warnings.warn(
                f"The checkpoint was made on other training data or batches: {then_and_now}. The run goes on at sample "
                f"{state['samples']} of the data that it has now.",
                stacklevel=2,
            )
        old = 0 if self.progress is None else self.progress.batches_into_step(accumulated)
        inside = state.get("batches_into_step", old)
        same_step = "batches_into_step" in state and accumulated == self._stream.accumulate
        goes_on = inside > 0 and same_step and "batch_size" not in changed
        if inside:
            warnings.warn(
                f"The checkpoint was made inside an optimizer step: {inside} of its {accumulated} accumulated batches "
                "were done, and their gradients are not in it. "
                + ("The first step of this run misses them." if goes_on else "This run begins with a whole step."),
                stacklevel=2,
            )
        if self.progress is not None and not goes_on:
            self.progress.begin_step(accumulated)
        windows = tuple(state["windows"].get(name, 0) for name in self.parts)
        self.go_to(Position(state["samples"], windows), inside if goes_on else 0)


class HeldOutBatches(Dataset[Batch]):
    """One rank's batches of held-out windows, the same number on every rank.

    A batch has rows of one domain. Rows are dealt out to the ranks and then evenly to batches, so every row is read
    exactly once over all ranks. Only where a rank has none left for a batch, it gets one row with nothing to predict.

    Args:
        domains: Held-out windows of each domain.
        rows: Sequences per batch, at most.
        rank: This process.
        world_size: All processes.
        with_documents: Give each batch ``document`` as well.
    """

    def __init__(
        self,
        domains: Sequence[HeldOutWindows],
        *,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
        with_documents: bool = False,
    ) -> None:
        self._domains = list(domains)
        self._with_documents = with_documents
        self._batches: list[tuple[int, Int64Array]] = []
        for domain, windows in enumerate(self._domains):
            most = -(-len(windows) // world_size)
            mine = np.arange(rank, len(windows), world_size)
            num_batches = -(-most // rows)
            if num_batches:
                self._batches += [(domain, part) for part in np.array_split(mine, num_batches)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        domain, chosen = self._batches[index]
        windows = self._domains[domain]
        rows = [windows[int(row)] for row in chosen]
        documents = [windows.document_numbers(int(row)) for row in chosen] if self._with_documents else []
        if not rows:
            input_ids, labels = windows[0]
            rows = [(np.full_like(input_ids, EOS_TOKEN_ID), np.full_like(labels, IGNORED_LABEL))]
            documents = [np.zeros_like(input_ids)] if self._with_documents else []
        batch = {
            "input_ids": torch.from_numpy(np.stack([row[0] for row in rows])),
            "labels": torch.from_numpy(np.stack([row[1] for row in rows])),
            "domain": torch.full((len(rows),), domain, dtype=torch.int64),
        }
        return batch | ({"document": torch.from_numpy(np.stack(documents))} if documents else {})


def held_out_loader(batches: HeldOutBatches, *, pin_memory: bool = False) -> DataLoader[Batch]:
    """Make the loader of validation or test. Cutting a window from a mapped file needs no worker."""
    # Sharding is done; a sampler of this kind, for one replica, keeps Lightning from doing it again.
    sampler: DistributedSampler[Batch] = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(batches, batch_size=None, sampler=sampler, pin_memory=pin_memory)
