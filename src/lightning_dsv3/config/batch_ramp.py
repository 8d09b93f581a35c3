"""The batch-size ramp on tokens (report, section 4.2): how many sequences each optimizer step sees.

    sequences
      |            ________    batch_size
      |         __|            from the first step that begins at ``until`` tokens or later
      |      __|               steps of ``increment``, below the straight line from ``start`` to ``batch_size``
      |   __|
      |  start
      +---------------------   tokens seen when the step begins

A step's size depends on the samples (sequences) before it, and those on the sizes of the steps before. The sizes rise
in few jumps, so the whole run is kept as one entry per jump and every question is a bisection. All sums are integers.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from lightning_dsv3.config.errors import ConfigError


@dataclass(frozen=True)
class BatchRamp:
    """A batch that rises with the tokens seen, up to ``train.batch_size``.

    Attributes:
        start: Sequences of the first optimizer step, over all ranks and micro-batches.
        until: Tokens seen from which on a step has the whole batch.
        increment: In between, sizes are ``start`` plus a multiple of this many sequences, rounded down.
    """

    start: int
    until: float
    increment: int

    def __post_init__(self) -> None:
        for key in ("start", "increment"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.schedule.batch_ramp.{key}={getattr(self, key)}: must be 1 or more")
        if not (math.isfinite(self.until) and self.until > 0):
            raise ConfigError(
                f"train.schedule.batch_ramp.until={self.until}: must be a positive number of tokens; for one batch "
                "size throughout use train.schedule.batch_ramp=null"
            )


@dataclass(frozen=True)
class BatchSizes:
    """The samples of every optimizer step, over all ranks and micro-batches.

    Attributes:
        size: Sequences per step; with a ramp those behind its end.
        ramp: The way up to ``size``; None for one size throughout.
        sequence_length: Tokens per sequence, which only the ramp needs.
        first: The sample that step 0 begins with.

    >>> sizes = BatchSizes(8, BatchRamp(start=2, until=24, increment=2))
    >>> [len(sizes.samples(step)) for step in range(10)]
    [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    >>> sizes.samples(4), sizes.num_steps(12)
    (range(8, 12), 5)
    """

    size: int
    ramp: BatchRamp | None = None
    sequence_length: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"train.batch_size={self.size}: must be 1 or more")
        if self.ramp is not None and self.ramp.start > self.size:
            raise ConfigError(
                f"train.schedule.batch_ramp.start={self.ramp.start}: the ramp rises to train.batch_size={self.size}; "
                "lower the first or raise the second"
            )

    @classmethod
    def of(cls, value: int | BatchSizes) -> BatchSizes:
        """Read either of the forms that users write: a number of sequences, or the sizes of all steps."""
        return value if isinstance(value, BatchSizes) else cls(value)

    def samples(self, step: int) -> range:
        """Return the samples that optimizer step ``step`` sees."""
        steps, samples, sizes = self._jumps
        last = bisect.bisect_right(steps, step) - 1
        begin = samples[last] + (step - steps[last]) * sizes[last]
        return range(begin, begin + sizes[last])

    def num_steps(self, samples: int) -> int:
        """Return the fewest optimizer steps after which all samples before number ``samples`` were seen."""
        if samples <= self.first:
            return 0
        steps, begins, sizes = self._jumps
        last = bisect.bisect_left(begins, samples) - 1
        return steps[last] - (begins[last] - samples) // sizes[last]

    def beginning_at(self, sample: int) -> BatchSizes:
        """Return the sizes of a run that begins a step at ``sample``: those of this run, where one begins there."""
        return replace(self, first=sample)

    @property
    def sizes(self) -> dict[int, int]:
        """Every size that a step has, in rising order, with the first sample of the first step that has it."""
        _, samples, sizes = self._jumps
        return dict(zip(sizes, samples, strict=True))

    def check_shares(self, processes: int, accumulated: int) -> None:
        """Refuse sizes that cannot be dealt out evenly, also those that come later in a run.

        Args:
            processes: Ranks that share an optimizer step.
            accumulated: Micro-batches of each rank in it.

        Raises:
            ConfigError: A size that does not divide, with the nearest that do.
        """
        shares, ramp = processes * accumulated, self.ramp
        # All sizes of the ramp, as a run that is resumed between two steps of this one may meet any of them.
        sizes = [] if ramp is None else range(ramp.start, self.size, ramp.increment)
        wrong = [size for size in [*sizes, self.size] if size % shares]
        if not wrong:
            return
        whole = max(shares, round(self.size / shares) * shares)
        fix = f"train.batch_size={whole}"
        if ramp is not None:
            start, increment = (min(whole, -(-n // shares) * shares) for n in (ramp.start, ramp.increment))
            fix += f", train.schedule.batch_ramp.start={start} and train.schedule.batch_ramp.increment={increment}"
        raise ConfigError(
            f"train.batch_size={self.size}: "
            + ("is" if wrong[0] == self.size else f"train.schedule.batch_ramp leads to it through {wrong[0]}, which is")
            + f" all sequences of an optimizer step and must divide by {processes} processes x {accumulated} "
            f"accumulated batches = {shares}; use {fix}, or change trainer.accumulate_grad_batches or the number of "
            "devices"
        )

    def to_plain(self) -> int | dict[str, Any]:
        """Return what decides about the sizes as plain values, for checkpoints."""
        return self.size if self.ramp is None else {"size": self.size, **asdict(self.ramp)}

    @cached_property
    def _jumps(self) -> tuple[list[int], list[int], list[int]]:
        """Where the size changes: numbers of the steps, their first samples, their sizes."""
        steps, samples, sizes = [0], [self.first], []
        while True:
            size, end = self._size_at(samples[-1])
            sizes.append(size)
            if end is None:
                return steps, samples, sizes
            count = -(-(end - samples[-1]) // size)
            steps.append(steps[-1] + count)
            samples.append(samples[-1] + count * size)

    def _size_at(self, sample: int) -> tuple[int, int | None]:
        """Return the size of a step that begins at ``sample``, and the first sample at which a larger one begins."""
        ramp = self.ramp
        if ramp is None or ramp.start == self.size:
            return self.size, None
        # ``until`` as the fraction that it is exactly, so that only integers are compared.
        until, unit = ramp.until.as_integer_ratio()
        rise, tokens = self.size - ramp.start, self.sequence_length * unit
        if sample * tokens >= until:
            return self.size, None
        level = rise * sample * tokens // (until * ramp.increment)
        next_level = -(-(level + 1) * until * ramp.increment // (rise * tokens))
        return ramp.start + level * ramp.increment, min(next_level, -(-until // tokens))
