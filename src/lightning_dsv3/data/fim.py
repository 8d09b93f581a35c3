"""Fill in the middle (report, section 4.1): some training documents are read prefix, suffix, middle.

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <｜end▁of▁sentence｜>

The rearrangement is made of whole documents, before they are packed. In every epoch another choice of documents is
rearranged, each at other cuts; both follow from (seed, domain, epoch, document), so a resumed run sees the same. Every
epoch rearranges the same number of documents (the rate's share, rounded), so all epochs are equally long and a window
is still found without reading those before it.

Cuts fall between tokens: the tokens of the three pieces are those of the whole document, and nothing is encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_dsv3.config import ConfigError
from lightning_dsv3.data.sampling import derive_key, scramble
from lightning_dsv3.data.tokenizer import FULL_VOCAB_SIZE, load_tokenizer

Int64Array = npt.NDArray[np.int64]

FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


@dataclass(frozen=True)
class Cuts:
    """One epoch's rearranged documents.

    Attributes:
        first: Where the middle begins, int64 [documents]; -1 for a document that is left as it is.
        second: Where the suffix begins, int64 [documents]; the middle is never empty.
    """

    first: Int64Array
    second: Int64Array


@dataclass(frozen=True)
class FillInTheMiddle:
    """How many documents are rearranged, and the ids that mark the pieces.

    Attributes:
        rate: Share of the documents, 0 to 1.
        begin: Id before the prefix.
        hole: Id before the suffix.
        end: Id before the middle.
    """

    rate: float
    begin: int
    hole: int
    end: int

    @classmethod
    def with_tokenizer(cls, rate: float, vocab_size: int) -> FillInTheMiddle:
        """Look the ids up in the tokenizer.

        Raises:
            ConfigError: The ids are not below ``vocab_size``.
        """
        tokenizer = load_tokenizer(vocab_size)
        begin, hole, end = (tokenizer.token_to_id(token) for token in FIM_TOKENS)
        if begin is None or hole is None or end is None:
            raise ConfigError(
                f"data.fim_rate={rate}: the tokens {' '.join(FIM_TOKENS)} stand at the end of the vocabulary and "
                f"model.vocab_size={vocab_size} leaves them out; use model.vocab_size={FULL_VOCAB_SIZE} or "
                "data.fim_rate=0"
            )
        return cls(rate, begin, hole, end)

    def num_rearranged(self, documents: int) -> int:
        """Return how many of so many documents every epoch rearranges."""
        return round(self.rate * documents)

    def cuts(self, keys: npt.NDArray[np.uint64], length: Int64Array, seed: int, domain: str, epoch: int) -> Cuts:
        """Choose an epoch's documents and cut them.

        Args:
            keys: The documents' hashes, uint64 [documents].
            length: Their tokens, int64 [documents].
            seed: The run's seed.
            domain: Name of the training text.
            epoch: Pass over the documents.
        """

        def draw(purpose: str) -> npt.NDArray[np.uint64]:
            return scramble(keys, derive_key("fim", purpose, seed, domain, epoch))

        chosen = np.argsort(draw("choice"), kind="stable")[: self.num_rearranged(len(keys))]
        # Two different places out of 0 .. length, every pair with the same chance.
        size = length[chosen].astype(np.uint64)
        one = (draw("one")[chosen] % (size + np.uint64(1))).astype(np.int64)
        other = (draw("other")[chosen] % size).astype(np.int64)
        other += other >= one
        first, second = np.full(len(keys), -1), np.full(len(keys), -1)
        first[chosen], second[chosen] = np.minimum(one, other), np.maximum(one, other)
        return Cuts(first, second)

    def pieces(self, length: int, first: int, second: int) -> Iterator[tuple[int, int, int]]:
        """Yield the marks and the stretches of the document that follow them: (id, start, stop)."""
        yield self.begin, 0, first
        yield self.hole, second, length
        yield self.end, first, second
