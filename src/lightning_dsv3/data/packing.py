"""From documents to sequences: one stream of tokens per domain, cut into windows that overlap by one token.

Stream. An end-of-sentence token stands before every document, so it separates two documents, and the first token of a
document is predicted from it rather than from nothing:

    EOS a a a EOS b b EOS c c c c EOS ...

Windows. The model predicts token t + 1 from the tokens up to t and shifts the labels itself, so of a window's S tokens
the first is never a target. Windows therefore start S - 1 tokens apart:

    EOS a a a EOS
                EOS b b EOS c           S = 5; the last token of a window is the first of the next
                            c c c c EOS

Every byte of text is a target exactly once. So bits per byte is a statement about a text and not about a sample of its
tokens, and :meth:`HeldOutWindows.text` can give other compressors exactly the same bytes. The price is one token in S
computed twice.

Attention reaches over a document's border, as in the report's pre-training (section 4.1), unless the model is told each
position's document. ``document_numbers`` counts them from where documents lie in the stream and not from the tokens; an
end-of-sentence belongs to the document that it begins:

    EOS a a a EOS b b EOS c
     0  0 0 0  1  1 1  2  2

Held-out text is one pass in a fixed order; what its last window has too much is EOS with label -100. Training text is
endless: epoch after epoch, each with its documents in its own order and with no break between them, so no token is lost
there either. Windows are shuffled once more, as many at a time as an epoch has: in stream order a long document would
fill its domain's share of many steps. Window n is found without reading windows 0 .. n - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_dsv3.data.fim import Cuts, FillInTheMiddle
from lightning_dsv3.data.sampling import derive_key, permuted, scramble
from lightning_dsv3.data.token_cache import TokenizedSource
from lightning_dsv3.data.tokenizer import EOS_TOKEN_ID

IGNORED_LABEL = -100

Int64Array = npt.NDArray[np.int64]


class DocumentTable:
    """The documents of one domain (or of a split of it), wherever their tokens lie.

    Args:
        sources: The sources, all tokenised alike; their documents follow one another.
        chosen: int64, which documents to keep; all if None.
    """

    def __init__(self, sources: Sequence[TokenizedSource], chosen: Int64Array | None = None) -> None:
        self._sources = list(sources)
        self._arrays: list[npt.NDArray[np.unsignedinteger]] | None = None
        records = [source.documents for source in self._sources]
        everything = np.concatenate(records)
        source_of = np.repeat(np.arange(len(records)), [len(part) for part in records])
        starts = np.concatenate([np.cumsum(part["tokens"]) - part["tokens"] for part in records])
        kept = np.arange(len(everything)) if chosen is None else chosen
        self.key: npt.NDArray[np.uint64] = everything["key"][kept]
        self.length: Int64Array = everything["tokens"][kept]
        self.text_bytes = int(everything["bytes"][kept].sum())
        self._source_of, self._start = source_of[kept], starts[kept]

    def __len__(self) -> int:
        return len(self.length)

    def __getstate__(self) -> dict[str, Any]:
        # A data worker that is not forked maps the files again; without this it would be sent all tokens.
        return {**self.__dict__, "_arrays": None}

    @property
    def num_tokens(self) -> int:
        """Tokens of text, without end-of-sentence."""
        return int(self.length.sum())

    def tokens(self, document: int, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Return tokens start .. stop - 1 of one document."""
        if self._arrays is None:
            self._arrays = [source.tokens for source in self._sources]
        offset = int(self._start[document])
        return self._arrays[self._source_of[document]][offset + start : offset + stop]


class TokenStream:
    """Documents in an order, an end-of-sentence before each, as one long array that is never made.

    Args:
        documents: The documents.
        order: int64 [documents], which comes when.
        fim: Marks of the documents that are rearranged; None rearranges none.
        cuts: Which these are, and where they are cut.
    """

    def __init__(
        self,
        documents: DocumentTable,
        order: Int64Array,
        fim: FillInTheMiddle | None = None,
        cuts: Cuts | None = None,
    ) -> None:
        self._documents = documents
        self._order = order
        self._fim, self._cuts = fim, cuts
        length = documents.length if cuts is None else documents.length + 3 * (cuts.first >= 0)
        # Where each document's end-of-sentence stands; behind the last document is the stream's end.
        self._begin = np.concatenate([[0], np.cumsum(length[order] + 1)])

    def __len__(self) -> int:
        return int(self._begin[-1])

    def read(self, start: int, stop: int) -> Int64Array:
        """Return tokens start .. stop - 1; behind the end there are only end-of-sentences."""
        tokens = np.full(stop - start, EOS_TOKEN_ID, dtype=np.int64)
        place = int(np.searchsorted(self._begin, start, side="right")) - 1
        while place < len(self._order) and self._begin[place] < stop:
            text_begin, text_end = int(self._begin[place]) + 1, int(self._begin[place + 1])
            first, last = max(text_begin, start), min(text_end, stop)
            if first < last:
                document = int(self._order[place])
                self._fill(tokens[first - start : last - start], document, first - text_begin)
            place += 1
        return tokens

    def document_numbers(self, start: int, stop: int) -> Int64Array:
        """Return which document of the order tokens start .. stop - 1 belong to; behind the end there is one more."""
        return np.searchsorted(self._begin, np.arange(start, stop), side="right") - 1

    def _fill(self, target: Int64Array, document: int, start: int) -> None:
        """Write a document's tokens into ``target``, beginning with number ``start``."""
        if self._fim is None or self._cuts is None or self._cuts.first[document] < 0:
            target[:] = self._documents.tokens(document, start, start + len(target))
            return
        length, first = int(self._documents.length[document]), int(self._cuts.first[document])
        # ``place`` runs over the rearranged document, relative to the first token that is wanted.
        place = -start
        for mark, begin, end in self._fim.pieces(length, first, int(self._cuts.second[document])):
            if 0 <= place < len(target):
                target[place] = mark
            place += 1
            skipped, wanted = max(0, -place), min(end - begin, len(target) - place)
            if skipped < wanted:
                target[place + skipped : place + wanted] = self._documents.tokens(
                    document, begin + skipped, begin + wanted
                )
            place += end - begin


class HeldOutWindows:
    """The windows of a held-out text.

    Args:
        documents: A domain's held-out documents.
        sequence_length: Tokens per window S.
        limit: Take at most so many windows, spread evenly over the text; 0 takes all.
    """

    def __init__(self, documents: DocumentTable, sequence_length: int, limit: int = 0) -> None:
        self._stream = TokenStream(documents, np.arange(len(documents)))
        self._sequence_length = sequence_length
        # All of the stream is predicted but its first token, and one end-of-sentence behind it.
        self._num_targets = len(self._stream)
        windows = -(-self._num_targets // (sequence_length - 1))
        taken = min(limit, windows) if limit else windows
        self.chosen: list[int] = [(2 * index + 1) * windows // (2 * taken) for index in range(taken)]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Int64Array, Int64Array]:
        """Return input_ids and labels of the index-th window taken, both int64 [S]."""
        start = self._start(index)
        input_ids = self._stream.read(start, start + self._sequence_length)
        labels = input_ids.copy()
        labels[self._num_targets + 1 - start :] = IGNORED_LABEL
        return input_ids, labels

    def document_numbers(self, index: int) -> Int64Array:
        """Return the document of each position of the index-th window taken, counted from 0: int64 [S]."""
        start = self._start(index)
        return _from_zero(self._stream.document_numbers(start, start + self._sequence_length))

    def text(self, token_texts: Sequence[bytes]) -> bytes:
        """Return the text that the windows' targets spell."""
        targets = (self[index][1][1:] for index in range(len(self)))
        return b"".join(token_texts[token] for labels in targets for token in labels if token != IGNORED_LABEL)

    def _start(self, index: int) -> int:
        return self.chosen[index] * (self._sequence_length - 1)


class TrainingWindows:
    """The endless training windows of a domain.

    Args:
        documents: The domain's training documents.
        sequence_length: Tokens per window S.
        seed: Seeds the order of the documents in every epoch.
        domain: The domain's name; two domains shuffle independently.
        fim: Rearranges some documents of every epoch; None leaves all as they are.
    """

    def __init__(
        self,
        documents: DocumentTable,
        sequence_length: int,
        seed: int,
        domain: str,
        fim: FillInTheMiddle | None = None,
    ) -> None:
        self._documents = documents
        self._sequence_length = sequence_length
        self._seed, self._domain = seed, domain
        self._fim = fim
        self._epochs: dict[int, TokenStream] = {}
        marks = 0 if fim is None else 3 * fim.num_rearranged(len(documents))
        self.epoch_length = documents.num_tokens + len(documents) + marks
        self.windows_per_shuffle = max(1, self.epoch_length // (sequence_length - 1))

    def __getitem__(self, index: int) -> Int64Array:
        """Return window ``index``: int64 [S]."""
        return self.in_stream(self._shuffled(index))

    def document_numbers(self, index: int) -> Int64Array:
        """Return the document of each position of window ``index``, counted from 0: int64 [S]."""
        parts = [
            epoch * len(self._documents) + self._epoch(epoch).document_numbers(start, stop)
            for epoch, start, stop in self._stretches(self._shuffled(index))
        ]
        return _from_zero(np.concatenate(parts))

    def in_stream(self, window: int) -> Int64Array:
        """Return the window that begins ``window * (S - 1)`` tokens into the stream: int64 [S]."""
        parts = [self._epoch(epoch).read(start, stop) for epoch, start, stop in self._stretches(window)]
        return np.concatenate(parts)

    def _shuffled(self, index: int) -> int:
        shuffle, place = divmod(index, self.windows_per_shuffle)
        key = derive_key("windows", self._seed, self._domain, shuffle)
        return shuffle * self.windows_per_shuffle + permuted(place, self.windows_per_shuffle, key)

    def _stretches(self, window: int) -> Iterator[tuple[int, int, int]]:
        """Yield the epochs that a window reaches over, each with start and stop inside it."""
        start = window * (self._sequence_length - 1)
        stop = start + self._sequence_length
        while start < stop:
            epoch, offset = divmod(start, self.epoch_length)
            end = min(offset + stop - start, self.epoch_length)
            yield epoch, offset, end
            start += end - offset

    def _epoch(self, epoch: int) -> TokenStream:
        if epoch not in self._epochs:
            # The windows that are shuffled together, and a window by itself, reach over two epochs at the most.
            self._epochs = {kept: stream for kept, stream in self._epochs.items() if abs(kept - epoch) == 1}
            key = derive_key("order", self._seed, self._domain, epoch)
            keys, cuts = self._documents.key, None
            order = np.argsort(scramble(keys, key), kind="stable")
            if self._fim is not None:
                cuts = self._fim.cuts(keys, self._documents.length, self._seed, self._domain, epoch)
            self._epochs[epoch] = TokenStream(self._documents, order, self._fim, cuts)
        return self._epochs[epoch]


def _from_zero(numbers: Int64Array) -> Int64Array:
    return numbers - numbers[0]
