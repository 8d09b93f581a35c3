"""Streams, windows and draws, on documents whose tokens are easy to follow."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.data.packing import (
    IGNORED_LABEL,
    DocumentTable,
    HeldOutWindows,
    TokenStream,
    TrainingWindows,
)
from lightning_dsv3.data.sampling import Mixture, derive_key, permuted, scramble
from lightning_dsv3.data.token_cache import TokenizedSource

EOS = 1
BYTES = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]

documents_of_a_domain = st.lists(st.lists(st.integers(3, 258), min_size=1, max_size=12), min_size=1, max_size=8)


class WrittenSource(TokenizedSource):
    """A source whose tokens are in memory; the real one is tested with the corpus."""

    def __init__(self, documents, first_key=0):
        object.__setattr__(self, "written", documents)
        object.__setattr__(self, "first_key", first_key)

    @property
    def tokens(self):
        return np.array([token for document in self.written for token in document], dtype=np.uint16)

    @property
    def documents(self):
        records = [(self.first_key + i, len(d), len(d)) for i, d in enumerate(self.written)]
        return np.array(records, dtype=[("key", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])


def table(*sources, chosen=None):
    written = [WrittenSource(documents, 100 * number) for number, documents in enumerate(sources)]
    return DocumentTable(written, chosen)


def with_separators(documents):
    return [token for document in documents for token in [EOS, *document]]


class TestTokenStream:
    def test_an_end_of_sentence_stands_before_every_document(self):
        stream = TokenStream(table([[5, 6, 7], [8]], [[9, 10]]), np.array([0, 2, 1]))
        assert len(stream) == 9
        assert stream.read(0, 9).tolist() == [1, 5, 6, 7, 1, 9, 10, 1, 8]

    def test_behind_the_end_there_are_only_separators(self):
        stream = TokenStream(table([[5, 6]]), np.array([0]))
        assert stream.read(1, 6).tolist() == [5, 6, 1, 1, 1]

    @given(documents=documents_of_a_domain, data=st.data())
    def test_any_part_equals_the_part_of_the_whole(self, documents, data):
        order = data.draw(st.permutations(range(len(documents))))
        stream = TokenStream(table(documents), np.array(order))
        whole = with_separators([documents[place] for place in order])
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        assert stream.read(start, stop).tolist() == whole[start:stop]

    def test_a_choice_of_documents_keeps_their_tokens(self):
        chosen = table([[5, 6, 7], [8]], [[9, 10], [11]], chosen=np.array([1, 2]))
        assert TokenStream(chosen, np.arange(2)).read(0, 5).tolist() == [1, 8, 1, 9, 10]
        assert (len(chosen), chosen.num_tokens, chosen.text_bytes) == (2, 3, 3)


class TestHeldOutWindows:
    @given(documents=documents_of_a_domain, length=st.integers(2, 9))
    def test_every_token_of_text_is_a_target_exactly_once(self, documents, length):
        windows = HeldOutWindows(table(documents), length)
        targets = [token for i in range(len(windows)) for token in windows[i][1][1:] if token != IGNORED_LABEL]
        assert targets == [*with_separators(documents)[1:], EOS]

    @given(documents=documents_of_a_domain, length=st.integers(2, 9))
    def test_the_text_is_the_documents_byte_by_byte(self, documents, length):
        text = HeldOutWindows(table(documents), length).text(BYTES)
        assert text == b"".join(BYTES[token] for document in documents for token in document)

    @given(documents=documents_of_a_domain, length=st.integers(2, 9))
    def test_windows_overlap_by_one_token(self, documents, length):
        windows = HeldOutWindows(table(documents), length)
        for i in range(len(windows) - 1):
            assert windows[i][0][-1] == windows[i + 1][0][0]

    @given(documents=documents_of_a_domain, length=st.integers(2, 9))
    def test_labels_are_the_ids_but_on_padding(self, documents, length):
        windows = HeldOutWindows(table(documents), length)
        for i in range(len(windows)):
            input_ids, labels = windows[i]
            assert input_ids.shape == labels.shape == (length,)
            padding = labels == IGNORED_LABEL
            assert (input_ids[~padding] == labels[~padding]).all()
            assert (input_ids[padding] == EOS).all()
            # Only at the end of the last window, which still predicts something.
            assert i == len(windows) - 1 or not padding.any()
            assert not padding[:2].any()

    @given(documents=documents_of_a_domain, length=st.integers(2, 9), limit=st.integers(1, 12))
    def test_a_limit_takes_different_windows_of_the_same_cut(self, documents, length, limit):
        everything = HeldOutWindows(table(documents), length)
        some = HeldOutWindows(table(documents), length, limit)
        assert len(some) == len(set(some.chosen)) == min(limit, len(everything))
        for i, window in enumerate(some.chosen):
            np.testing.assert_array_equal(some[i], everything[window])

    def test_a_limit_spreads_over_the_text(self):
        windows = HeldOutWindows(table([[5] * 1000]), 11, limit=4)
        assert windows.chosen == [12, 37, 63, 88]

    def test_the_text_of_some_windows_is_what_they_predict(self):
        windows = HeldOutWindows(table([list(range(10, 40))]), 6, limit=2)
        targets = [token for i in range(2) for token in windows[i][1][1:]]
        assert windows.text(BYTES) == b"".join(BYTES[token] for token in targets)

    def test_no_documents_give_no_windows(self):
        windows = HeldOutWindows(table([[5]], chosen=np.array([], dtype=np.int64)), 4, limit=3)
        assert len(windows) == 0
        assert windows.text(BYTES) == b""


class TestTrainingWindows:
    @given(documents=documents_of_a_domain, length=st.integers(2, 9), seed=st.integers(0, 3))
    def test_every_epoch_has_every_document_once(self, documents, length, seed):
        windows = TrainingWindows(table(documents), length, seed, "english")
        epoch = len(with_separators(documents))
        needed = -(-3 * epoch // (length - 1)) + 1
        cuts = [windows.in_stream(i) for i in range(needed)]
        stream = [int(cuts[0][0]), *(int(token) for cut in cuts for token in cut[1:])]
        for start in (0, epoch, 2 * epoch):
            part = stream[start : start + epoch]
            assert part[0] == EOS
            cut = [list(map(int, text.split())) for text in " ".join(map(str, part[1:])).split(f" {EOS} ")]
            assert sorted(cut) == sorted(documents)

    @given(documents=documents_of_a_domain, length=st.integers(2, 9), data=st.data())
    def test_windows_can_be_read_in_any_order(self, documents, length, data):
        in_order = TrainingWindows(table(documents), length, 0, "english")
        expected = [in_order[i].tolist() for i in range(30)]
        fresh = TrainingWindows(table(documents), length, 0, "english")
        for i in data.draw(st.permutations(range(30))):
            assert fresh[i].tolist() == expected[i]

    def test_windows_overlap_by_one_token_across_epochs_too(self):
        windows = TrainingWindows(table([[5, 6, 7], [8, 9]]), 4, 0, "english")
        for i in range(20):
            assert windows.in_stream(i)[-1] == windows.in_stream(i + 1)[0]

    @given(documents=documents_of_a_domain, length=st.integers(2, 9), shuffle=st.integers(0, 2))
    def test_every_window_comes_once_in_a_shuffle(self, documents, length, shuffle):
        windows = TrainingWindows(table(documents), length, 0, "english")
        size = windows.windows_per_shuffle
        block = range(shuffle * size, (shuffle + 1) * size)
        in_stream = sorted(windows.in_stream(i).tolist() for i in block)
        assert sorted(windows[i].tolist() for i in block) == in_stream

    def test_a_long_document_does_not_fill_neighbouring_windows(self):
        windows = TrainingWindows(table([list(range(10, 260)), list(range(300, 550))]), 11, 0, "english")
        assert windows.windows_per_shuffle == 50
        first = [bool((windows[i] >= 300).any()) for i in range(25)]
        assert 5 < sum(first) < 20

    def test_a_window_may_span_several_epochs(self):
        windows = TrainingWindows(table([[5]]), 7, 0, "english")
        assert windows[0].tolist() == [1, 5, 1, 5, 1, 5, 1]

    def test_order_depends_on_seed_domain_and_epoch(self):
        documents = table([[token] for token in range(3, 67)])
        epoch = 128

        def order(seed, domain, number):
            return TrainingWindows(documents, epoch + 1, seed, domain)[number].tolist()[1:epoch:2]

        first = order(0, "english", 0)
        assert sorted(first) == list(range(3, 67))
        assert first != sorted(first)
        assert len({tuple(order(*which)) for which in [(0, "english", 0), (1, "english", 0), (0, "code", 0)]}) == 3
        assert order(0, "english", 1) != first

    def test_another_source_leaves_the_order_of_the_first_alone(self):
        def order(documents):
            return TrainingWindows(documents, 2 * len(documents) + 1, 0, "english")[0].tolist()[1::2]

        alone = order(table([[token] for token in range(3, 20)]))
        both = order(table([[token] for token in range(3, 20)], [[token] for token in range(100, 120)]))
        assert [token for token in both if token < 100] == alone

    def test_pickles_without_its_tokens(self):
        windows = TrainingWindows(table([list(range(3, 250)) * 4000]), 8, 0, "english")
        expected = windows[5].tolist()
        documents = windows._documents
        assert documents._arrays is not None
        assert documents.__getstate__()["_arrays"] is None
        assert pickle.loads(pickle.dumps(windows))[5].tolist() == expected


class TestMixture:
    def test_shares_are_the_weights(self):
        counts = Mixture([3.0, 1.0, 0.0, 4.0], seed=0).counts(0, 80_000)
        assert counts[2] == 0
        # Four standard deviations of a binomial count are below 570.
        np.testing.assert_allclose(counts, [30_000, 10_000, 0, 40_000], atol=570)

    @given(start=st.integers(0, 2**40), lengths=st.tuples(st.integers(0, 50), st.integers(0, 50)))
    def test_draws_do_not_depend_on_where_reading_begins(self, start, lengths):
        mixture = Mixture([0.5, 0.2, 0.3], seed=7)
        middle, stop = start + lengths[0], start + sum(lengths)
        parts = np.concatenate([mixture.domains(start, middle), mixture.domains(middle, stop)])
        np.testing.assert_array_equal(parts, mixture.domains(start, stop))
        np.testing.assert_array_equal(np.bincount(parts, minlength=3), mixture.counts(start, stop))

    def test_neighbours_are_independent(self):
        domains = Mixture([0.5, 0.5], seed=0).domains(0, 100_000) - 0.5
        for lag in (1, 2, 8, 64):
            # Four standard deviations of the mean of products.
            assert abs(np.mean(domains[:-lag] * domains[lag:]) * 4) < 4 / np.sqrt(100_000)

    def test_seeds_give_other_draws(self):
        draws = [Mixture([0.5, 0.5], seed).domains(0, 64).tolist() for seed in range(4)]
        assert len({tuple(draw) for draw in draws}) == 4

    def test_draws_stay_the_same_for_ever(self):
        # A change here breaks the resume of every run that was started before it.
        assert Mixture([0.25] * 4, seed=0).domains(0, 16).tolist() == [3, 3, 1, 0, 1, 0, 3, 1, 2, 2, 3, 2, 1, 3, 1, 0]
        assert (
            int(scramble(np.array([5], dtype=np.uint64), derive_key("order", 0, "english", 0))[0])
            == 11898994195511667565
        )


@pytest.mark.parametrize("key", [np.uint64(0), derive_key("any")])
def test_scrambling_is_one_to_one(key):
    assert len(np.unique(scramble(np.arange(100_000, dtype=np.uint64), key))) == 100_000


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(i, size, np.uint64(key)) for i in range(size)) == list(range(size))


def test_permutations_stay_the_same_for_ever():
    # A change here breaks the resume of every run that was started before it.
    assert [permuted(i, 1000, derive_key("windows", 0, "english", 0)) for i in range(4)] == [384, 640, 530, 207]
