"""Fill in the middle: whole documents, the report's format, the rate's share, the same after a resume."""

import numpy as np
import pytest

from lightning_dsv3.config import ConfigError, load_run_config
from lightning_dsv3.data import DeepSeekV3DataModule, load_tokenizer
from lightning_dsv3.data.fim import FillInTheMiddle
from lightning_dsv3.data.packing import DocumentTable, TokenStream, TrainingWindows

BEGIN, HOLE, END, EOS = 128801, 128800, 128802, 1
FULL = 129_280


class Documents(DocumentTable):
    """Documents in memory: document d is the numbers 1000 d, 1000 d + 1, ..."""

    def __init__(self, lengths):
        self.length = np.array(lengths, dtype=np.int64)
        self.key = np.arange(len(lengths), dtype=np.uint64) * np.uint64(0x1234567)

    def tokens(self, document, start, stop):
        assert 0 <= start <= stop <= self.length[document]
        return 1000 * document + np.arange(start, stop)


LENGTHS = [1, 2, 3, 5, 8, 40, 1, 17, 2, 63]


def fim(rate):
    return FillInTheMiddle(rate, BEGIN, HOLE, END)


def split(tokens):
    """Cut a stream at its end-of-sentences."""
    borders = np.flatnonzero(tokens == EOS).tolist()
    return [tokens[a + 1 : b].tolist() for a, b in zip(borders, [*borders[1:], len(tokens)], strict=True)]


def undone(document):
    """Check the format of a rearranged document and put its pieces back."""
    assert document[0] == BEGIN
    hole, end = document.index(HOLE), document.index(END)
    prefix, suffix, middle = document[1:hole], document[hole + 1 : end], document[end + 1 :]
    assert middle
    return prefix + middle + suffix


def epoch(windows, number):
    return windows._epoch(number).read(0, windows.epoch_length)


class TestRearrangement:
    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
    def test_the_share_is_rearranged_and_nothing_is_lost(self, rate):
        documents = Documents(LENGTHS)
        windows = TrainingWindows(documents, 8, seed=0, domain="a", fim=fim(rate))
        for number in range(5):
            seen = split(epoch(windows, number))
            rearranged = [document for document in seen if document[0] == BEGIN]
            assert len(rearranged) == round(rate * len(LENGTHS))
            whole = [undone(document) if document[0] == BEGIN else document for document in seen]
            assert sorted(whole) == [[1000 * d + n for n in range(length)] for d, length in enumerate(LENGTHS)]

    def test_any_stretch_is_that_of_the_whole(self):
        documents = Documents([5, 9, 1])
        settings = fim(1.0)
        cuts = settings.cuts(documents.key, documents.length, 3, "a", 0)
        stream = TokenStream(documents, np.array([2, 0, 1]), settings, cuts)
        whole = stream.read(0, len(stream))
        assert len(whole) == 5 + 9 + 1 + 3 * 4
        for start in range(len(whole)):
            for stop in range(start, len(whole) + 1):
                assert stream.read(start, stop).tolist() == whole[start:stop].tolist()

    def test_windows_cover_every_epoch(self):
        windows = TrainingWindows(Documents(LENGTHS), 8, seed=0, domain="a", fim=fim(0.5))
        stream = np.concatenate([epoch(windows, number) for number in range(4)])
        for index in range(3 * windows.epoch_length // 7):
            assert windows.in_stream(index).tolist() == stream[7 * index : 7 * index + 8].tolist()

    def test_choice_and_cuts_follow_seed_and_epoch(self):
        def seen(seed, number):
            return epoch(TrainingWindows(Documents([50] * 40), 8, seed, "a", fim(0.5)), number).tolist()

        assert seen(0, 0) == seen(0, 0)
        documents = Documents([50] * 40)
        drawn = [
            fim(0.5).cuts(documents.key, documents.length, *key) for key in [(0, "a", 0), (0, "a", 1), (1, "a", 0)]
        ]
        for one, other in [(0, 1), (0, 2)]:
            assert ((drawn[one].first >= 0) != (drawn[other].first >= 0)).any()
            both = (drawn[one].first >= 0) & (drawn[other].first >= 0)
            assert (drawn[one].first[both] != drawn[other].first[both]).any()

    def test_cuts_are_even_over_all_pairs(self):
        documents = Documents([3] * 6000)
        cuts = fim(1.0).cuts(documents.key, documents.length, 0, "a", 0)
        pairs, counts = np.unique(np.stack([cuts.first, cuts.second]), axis=1, return_counts=True)
        assert pairs.T.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
        assert counts.min() > 850
        assert counts.max() < 1150


class TestDataModule:
    TEXTS = tuple(f"number {n} is {n * n} and so on" for n in range(60))

    def make(self, cache, rate=0.5, **config):
        config = {"cache_dir": str(cache), "fim_rate": rate, "val_windows": 0} | config
        data = DeepSeekV3DataModule(
            config, vocab_size=FULL, sequence_length=16, batch_size=4, documents={"a": self.TEXTS}
        )
        data.setup()
        return data

    def test_training_text_has_the_tokenizer_s_own_marks_and_held_out_text_none(self, tmp_path):
        data = self.make(tmp_path)
        loader = iter(data.train_dataloader())
        seen = {token for _ in range(20) for token in next(loader)["input_ids"].flatten().tolist()}
        names = {"<｜fim▁begin｜>": BEGIN, "<｜fim▁hole｜>": HOLE, "<｜fim▁end｜>": END}
        assert {name: load_tokenizer().token_to_id(name) for name in names} == names
        assert set(names.values()) <= seen
        held_out = [batch["input_ids"] for batch in [*data.val_dataloader(), *data.test_dataloader()]]
        assert not any((ids >= 128_000).any() for ids in held_out)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resume_is_exact(self, tmp_path, workers):
        through = iter(self.make(tmp_path).train_dataloader())
        # Well into the third epoch.
        batches = [next(through)["input_ids"] for _ in range(40)]
        first = self.make(tmp_path).train_dataloader()
        before = iter(first)
        for _ in range(35):
            next(before)
        second = self.make(tmp_path, num_workers=workers).train_dataloader()
        second.load_state_dict(first.state_dict())
        after = iter(second)
        assert all((next(after)["input_ids"] == batch).all() for batch in batches[35:])

    def test_another_rate_is_told_at_a_resume(self, tmp_path):
        state = self.make(tmp_path).train_dataloader().state_dict()
        with pytest.warns(UserWarning, match=r"fim_rate was 0\.5 and is 0\.0"):
            self.make(tmp_path, rate=0.0).train_dataloader().load_state_dict(state)


class TestErrors:
    def test_a_vocabulary_without_the_marks(self):
        with pytest.raises(
            ConfigError, match=r"data\.fim_rate=0\.1: .*model\.vocab_size=8192.*model\.vocab_size=129280"
        ):
            DeepSeekV3DataModule({"fim_rate": 0.1}, vocab_size=8192)

    @pytest.mark.parametrize("rate", ["-0.1", "1.5", "nan"])
    def test_a_rate_out_of_bounds(self, rate):
        with pytest.raises(ConfigError, match=rf"data\.fim_rate={rate}: .*from 0 to 1"):
            load_run_config([f"data.fim_rate={rate}"])
