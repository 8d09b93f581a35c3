r"""Schedules on tokens: the one clock that training hyper-parameters follow.

The report states its learning rate, MTP weight and bias update rate at token counts (section 4.2), so a schedule
is a list of marks on a token axis and nothing else. A run of another length keeps the shape and scales the axis.

    value
      |    ______________            until=10e12 value=2.2e-4 shape=constant
      |   /              \            until=14.3e12 value=2.2e-5 shape=cosine
      |  /                \____       until=14.633e12 value=2.2e-5 shape=constant
      | / until=25.2e9 value=2.2e-4 shape=linear
      +--------------------------- tokens seen, the current optimizer step's batch included
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dsv3.config.errors import ConfigError

SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Mark:
    """One segment of a schedule, which ends at ``until`` tokens.

    Attributes:
        until: End of the segment in tokens, inclusive.
        value: Value in the segment (``constant``), or the value reached at its end (``linear``, ``cosine``),
            coming from the value of the segment before, or from 0 in the first one.
        shape: ``constant``, ``linear`` or ``cosine``.
    """

    until: float
    value: float
    shape: str = "constant"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"schedule mark: shape={self.shape!r} is not one of {', '.join(SHAPES)}")
        if not (math.isfinite(self.until) and self.until > 0):
            raise ConfigError(f"schedule mark: until={self.until!r} must be a positive number of tokens")
        if not math.isfinite(self.value):
            raise ConfigError(f"schedule mark: value={self.value!r} must be finite")


class Schedule:
    """A function of tokens seen, made of marks. Behind the last mark its value stays.

    Args:
        marks: Segments in rising order of ``until``.
        token_scale: Every ``until`` is multiplied by it.

    Raises:
        ConfigError: No marks, or marks out of order.

    >>> rate = Schedule([Mark(100, 1.0, "linear"), Mark(1000, 1.0), Mark(2000, 0.1, "cosine")])
    >>> rate(50), rate(500), rate(2000), rate(9999)
    (0.5, 1.0, 0.1, 0.1)
    """

    def __init__(self, marks: Iterable[Mark], token_scale: float = 1.0) -> None:
        self.marks = tuple(Mark(mark.until * token_scale, mark.value, mark.shape) for mark in marks)
        if not self.marks:
            raise ConfigError("schedule: needs at least one mark {until: tokens, value: number}")
        self._ends = [mark.until for mark in self.marks]
        if any(a >= b for a, b in zip(self._ends, self._ends[1:], strict=False)):
            raise ConfigError(f"schedule: until={self._ends} must rise from mark to mark")

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """Return a schedule that has one value for ever."""
        return cls([Mark(1.0, value)])

    @classmethod
    def of(cls, value: float | Schedule | Iterable[Mark | Mapping[str, Any]]) -> Schedule:
        """Read a schedule from any of the forms that users and checkpoints write: a number, marks, dicts."""
        if isinstance(value, Schedule):
            return value
        if isinstance(value, (int, float)):
            return cls.constant(float(value))
        return cls([mark if isinstance(mark, Mark) else Mark(**mark) for mark in value])

    def __call__(self, tokens: float) -> float:
        """Return the value at ``tokens`` seen (the current optimizer step's batch included)."""
        index = bisect.bisect_left(self._ends, tokens)
        if index == len(self.marks):
            return self.marks[-1].value
        mark = self.marks[index]
        if mark.shape == "constant" or tokens == mark.until:
            return mark.value
        before = self.marks[index - 1] if index else Mark(1.0, 0.0)
        start = self._ends[index - 1] if index else 0.0
        progress = (tokens - start) / (mark.until - start)
        if mark.shape == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        return before.value + (mark.value - before.value) * progress

    def to_list(self) -> list[dict[str, Any]]:
        """Return the marks as plain dicts, for checkpoints and YAML. ``Schedule.of`` reads them back."""
        return [asdict(mark) for mark in self.marks]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.marks == other.marks

    def __hash__(self) -> int:
        return hash(self.marks)

    def __repr__(self) -> str:
        return f"Schedule({list(self.marks)!r})"
