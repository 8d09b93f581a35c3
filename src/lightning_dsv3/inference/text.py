"""Text that grows token by token: what can be printed already, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# How a character that is not complete yet shows in decoded text.
_INCOMPLETE = "\ufffd"
# Bytes that a character may lack its end of; some tokenizers show each by itself.
_MOST_INCOMPLETE = 3


class TextStream:
    """The text of one row.

    Tokens may end inside a character, and a stop string may begin in one token and end in another, so the text is
    decoded from a few tokens back and what may still become a stop string is held back.

    Args:
        decode: From token ids to text, as in ``Tokenizer.decode``.
        stop: The text ends before the first of these.

    Attributes:
        text: The text so far, complete characters alone.
        stopped: Whether a stop string has come.

    Example:
        >>> stream = TextStream(lambda ids: "".join("abc."[i] for i in ids), stop=["c."])
        >>> [stream.push([token]) for token in (0, 2, 1, 2, 3)]
        ['a', '', 'cb', '', '']
        >>> stream.text, stream.stopped
        ('acb', True)
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if any(not word for word in stop):
            raise ValueError("stop: an empty string would end the text at once; leave it out")
        self.text = ""
        self.stopped = False
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        # Decoding begins some tokens back, as what a token looks like may depend on the one before.
        self._begin = self._next_begin = 0
        self._decoded = 0  # characters from there that are in self.text
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that can be printed now and could not before."""
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            now = self._decode(self._ids[self._begin :])
            complete = now[: len(now) - min(len(now) - len(now.rstrip(_INCOMPLETE)), _MOST_INCOMPLETE)]
            self._add(complete[self._decoded :])
            self._decoded = max(self._decoded, len(complete))
            if complete == now:
                self._begin, self._next_begin = self._next_begin, len(self._ids)
                self._decoded = len(self._decode(self._ids[self._begin :]))
        return self._show(self._held_back())

    def finish(self) -> str:
        """Say that nothing follows; return what had been held back."""
        if not self.stopped:
            self._add(self._decode(self._ids[self._begin :])[self._decoded :])
            self._begin, self._decoded = len(self._ids), 0
        return self._show(0)

    def _add(self, piece: str) -> None:
        longest = max((len(word) for word in self._stop), default=1)
        begin = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [at for word in self._stop if (at := self.text.find(word, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max(
            (n for word in self._stop for n in range(1, len(word)) if self.text.endswith(word[:n])),
            default=0,
        )

    def _show(self, held_back: int) -> str:
        end = max(len(self.text) - held_back, self._shown)
        piece, self._shown = self.text[self._shown : end], end
        return piece
