"""The batch-size ramp: which samples each optimizer step sees, as numbers, as batches, and in a real Trainer."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks
from test_datamodule import DOMAINS, Recorder, fit, texts

from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config import BatchRamp, BatchSizes, ConfigError, DeepSeekV3Config, load_run_config
from lightning_dsv3.data import DeepSeekV3DataModule, loader
from lightning_dsv3.data.loader import Position, TrainingStream
from lightning_dsv3.data.sampling import Mixture
from lightning_dsv3.module import DeepSeekV3Module

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*`val_check_interval`.*", "ignore:.*checkpoint.*not.*empty.*", "ignore:.*log_every_n_steps.*"
)

S = 16
# Five steps of 4, three of 8, two of 12, then 16.
SIZES = BatchSizes(16, BatchRamp(start=4, until=60 * S, increment=4), sequence_length=S)
STEPS = 12


@st.composite
def ramps(draw: st.DrawFn, unit: int = 1) -> BatchSizes:
    """Ramps of some hundred steps, whose sizes all divide by ``unit``."""
    start, rise = draw(st.integers(1, 20)) * unit, draw(st.integers(0, 60)) * unit
    until = draw(st.one_of(st.integers(1, 10**6), st.floats(1e-3, 1e6)))
    ramp = BatchRamp(start, until, draw(st.integers(1, 70)) * unit)
    return BatchSizes(start + rise, ramp, draw(st.integers(1, 300)))


def literal_size(sizes: BatchSizes, sample: int) -> int:
    """Return the size of a step that begins at ``sample``, in the definition's own words."""
    assert sizes.ramp is not None
    start, until, increment = sizes.ramp.start, Fraction(sizes.ramp.until), sizes.ramp.increment
    tokens = sample * sizes.sequence_length
    if tokens >= until:
        return sizes.size
    return start + (sizes.size - start) * tokens / until // increment * increment


class TestSizes:
    @given(ramps(), st.integers(0, 400))
    def test_every_step_has_the_size_of_the_tokens_that_it_begins_at(self, sizes: BatchSizes, origin: int) -> None:
        sizes, sample = sizes.beginning_at(origin), origin
        for step in range(200):
            samples = sizes.samples(step)
            assert samples == range(sample, sample + literal_size(sizes, sample))
            sample = samples.stop

    @given(ramps(), st.integers(0, 10**12))
    def test_sizes_rise_to_the_batch_size_and_stay(self, sizes: BatchSizes, far: int) -> None:
        taken = [len(sizes.samples(step)) for step in range(300)]
        assert taken == sorted(taken)
        assert set(taken) <= set(sizes.sizes)
        assert taken[0] == sizes.ramp.start
        reached = sizes.num_steps(sizes.sizes[sizes.size])
        assert len(sizes.samples(reached + far)) == sizes.size

    @given(ramps(), st.integers(0, 10**9))
    def test_num_steps_is_the_fewest_that_reach_the_samples(self, sizes: BatchSizes, samples: int) -> None:
        steps = sizes.num_steps(samples)
        assert (sizes.samples(steps - 1).stop if steps else 0) >= samples
        assert steps == 0 or sizes.samples(steps - 1).start < samples

    @given(ramps(), st.integers(0, 10**9))
    def test_num_steps_and_samples_are_inverse(self, sizes: BatchSizes, step: int) -> None:
        samples = sizes.samples(step)
        assert sizes.num_steps(samples.start) == step
        assert sizes.num_steps(samples.start + 1) == sizes.num_steps(samples.stop) == step + 1
        assert sizes.samples(step + 1).start == samples.stop

    @given(ramps(), st.integers(0, 500), st.integers(0, 500))
    def test_a_run_that_begins_at_a_step_has_the_same_steps(self, sizes: BatchSizes, step: int, more: int) -> None:
        later = sizes.beginning_at(sizes.samples(step).start)
        assert later.samples(more) == sizes.samples(step + more)
        assert later.num_steps(sizes.samples(step + more).stop) == more + 1
        assert later.num_steps(0) == 0

    def test_no_ramp_is_one_size(self) -> None:
        for sizes in (BatchSizes.of(8), BatchSizes(8, BatchRamp(start=8, until=100, increment=3))):
            assert [sizes.samples(step) for step in (0, 10**15)] == [range(8), range(8 * 10**15, 8 * 10**15 + 8)]
            assert [sizes.num_steps(samples) for samples in (0, 1, 8, 9)] == [0, 1, 1, 2]
        assert BatchSizes.of(SIZES) is SIZES


class TestReport:
    @pytest.fixture
    def train(self) -> Any:
        return load_run_config(["train=report", "model=671b"]).train

    def test_the_marks_are_exact(self, train: Any) -> None:
        sizes = train.batch_sizes
        assert sizes.samples(0) == range(3072)
        assert sizes.ramp == BatchRamp(start=3072, until=469e9, increment=768)
        at_the_mark = sizes.num_steps(-(-469_000_000_000 // 4096))
        assert len(sizes.samples(at_the_mark)) == 15360
        assert len(sizes.samples(at_the_mark - 1)) == 14592
        assert list(sizes.sizes) == list(range(3072, 15361, 768))

    def test_the_whole_run_has_so_many_steps(self, train: Any) -> None:
        sample = steps = 0
        while sample * 4096 < 14_800_000_000_000:
            sample, steps = sample + literal_size(train.batch_sizes, sample), steps + 1
        assert train.max_steps == steps == 243_761
        # Without the ramp, 14.8e12 / (15360 * 4096).
        plain = load_run_config(["train=report", "model=671b", "train.schedule.batch_ramp=null"]).train
        assert plain.max_steps == 235_240

    def test_the_ramp_is_scaled_with_every_other_mark(self) -> None:
        words = ["train=report", "model=671b", "train.total_tokens=14800000000", "train.batch_size=16"]
        train = load_run_config([*words, "train.schedule.batch_ramp={start: 4, until: 4.69e+11, increment: 1}"]).train
        assert train.batch_sizes.ramp.until == pytest.approx(469e6)
        curve = train.scheduled("batch_size")
        assert (curve(1), curve(300e6), curve(480e6), curve(14.8e9)) == (4, 11, 16, 16)


class Numbered:
    """Windows that only say which they are."""

    def __init__(self, part: int) -> None:
        self.part = part

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self.part, index])


def stream(sizes: BatchSizes, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> TrainingStream:
    parts: list[Any] = [Numbered(part) for part in range(3)]
    mixture = Mixture([0.5, 0.3, 0.2], seed=0)
    return TrainingStream(
        parts, mixture, batch_sizes=sizes, accumulate=accumulate, rank=rank, world_size=world_size
    )  # fmt: skip


def micro_batches(layout: TrainingStream, workers: int, number: int) -> list[list[tuple[int, ...]]]:
    """Return the rows of a rank's first micro-batches, made by ``workers`` in turn as a DataLoader's would."""
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        iterators = []
        for worker in range(workers):
            info = SimpleNamespace(id=worker, num_workers=workers)
            patch.setattr(loader, "get_worker_info", lambda info=info: info)
            iterators.append(iter(layout))
            batches.append(next(iterators[-1]))
        batches += [next(iterator) for iterator in itertools.islice(itertools.cycle(iterators), max(0, number))]
    return [[tuple(row) for row in batch["input_ids"].tolist()] for batch in batches[:number]]


class TestStream:
    @given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
    def test_ranks_micro_batches_and_workers_share_the_samples_of_each_step(
        self, data: st.DataObject, world_size: int, accumulate: int, workers: int
    ) -> None:
        sizes = data.draw(ramps(world_size * accumulate))
        steps = 8
        alone = micro_batches(stream(sizes), 1, steps)
        assert [len(rows) for rows in alone] == [len(sizes.samples(step)) for step in range(steps)]
        layouts = [stream(sizes, accumulate, rank, world_size) for rank in range(world_size)]
        shares = [micro_batches(layout, workers, steps * accumulate) for layout in layouts]
        for step in range(steps):
            numbers = range(step * accumulate, (step + 1) * accumulate)
            together = [row for number in numbers for share in shares for row in share[number]]
            assert together == alone[step]
            assert len({len(share[number]) for number in numbers for share in shares}) == 1

    @given(st.data(), st.integers(1, 4), st.integers(0, 20))
    def test_a_stream_goes_on_from_any_micro_batch_of_any_step(
        self, data: st.DataObject, accumulate: int, done: int
    ) -> None:
        sizes = data.draw(ramps(accumulate))
        whole = stream(sizes, accumulate)
        step, inside = divmod(done, accumulate)
        start = whole.start.moved_to(sizes.samples(step).start, whole.mixture)
        resumed = stream(sizes, accumulate)
        resumed.begin_at(start, inside)
        assert micro_batches(resumed, 2, 6) == micro_batches(whole, 1, done + 6)[done:]

    def test_no_window_is_left_out_or_read_twice(self) -> None:
        rows = sorted(row for batch in micro_batches(stream(SIZES), 1, 30) for row in batch)
        counts = [sum(row[0] == part for row in rows) for part in range(3)]
        assert rows == [(part, index) for part in range(3) for index in range(counts[part])]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def data_module(cache: Path | str, workers: int = 0, batch_size: int | BatchSizes = SIZES) -> DeepSeekV3DataModule:
    config = {"weights": dict.fromkeys(DOMAINS, 1.0), "cache_dir": str(cache), "num_workers": workers}
    documents = {domain: texts(domain) for domain in DOMAINS}
    return DeepSeekV3DataModule(
        config, vocab_size=512, sequence_length=S, batch_size=batch_size, documents=documents
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(cache: Path) -> Recorder:
    """A plain run over the whole ramp in one process."""
    module = fit(data_module(cache), steps=STEPS)
    assert [len(rows) for rows in module.steps().values()] == [4] * 5 + [8] * 3 + [12] * 2 + [16] * 2
    return module


def rest(module: Recorder, step: int) -> dict[int, list[str]]:
    return {k: rows for k, rows in module.steps().items() if k >= step}


class SavesOnError(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.path)


def killed_inside_a_step(cache: Path, path: Path) -> None:
    """Leave a checkpoint with one of the two micro-batches of step 6, which has 8 samples."""
    module = Recorder()
    module.fail_at = (6, 13)
    trainer = L.Trainer(
        max_steps=STEPS, callbacks=[SavesOnError(path)], logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", accumulate_grad_batches=2,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(module, data_module(cache))


class TestRun:
    @pytest.mark.parametrize(("workers", "accumulate"), [(0, 2), (0, 4), (2, 1), (3, 2)])
    def test_accumulation_and_workers_change_nothing(
        self, cache: Path, uninterrupted: Recorder, workers: int, accumulate: int
    ) -> None:
        module = fit(data_module(cache, workers), steps=STEPS, accumulate_grad_batches=accumulate)
        assert module.steps() == uninterrupted.steps()

    @pytest.mark.parametrize(("before", "after", "accumulate"), [(0, 0, 1), (2, 3, 1), (0, 2, 2)])
    def test_a_resume_at_any_step_is_bit_equal(
        self, cache: Path, uninterrupted: Recorder, tmp_path: Path, before: int, after: int, accumulate: int
    ) -> None:
        whole = fit(data_module(cache, before), tmp_path, steps=STEPS, accumulate_grad_batches=accumulate)
        assert whole.steps() == uninterrupted.steps()
        for step in (1, 4, 5, 6, 9, 10, 11):
            resumed = fit(
                data_module(cache, after), resume=tmp_path / f"step={step}.ckpt", steps=STEPS,
                accumulate_grad_batches=accumulate,
            )  # fmt: skip
            assert resumed.steps() == rest(whole, step)
            assert torch.equal(resumed.weight, whole.weight)

    @pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (1, 4)])
    def test_another_accumulation_goes_on_at_whole_steps(
        self, cache: Path, uninterrupted: Recorder, tmp_path: Path, before: int, after: int
    ) -> None:
        fit(data_module(cache), tmp_path, steps=7, accumulate_grad_batches=before)
        for step in (3, 7):
            resumed = fit(
                data_module(cache), resume=tmp_path / f"step={step}.ckpt", steps=STEPS, accumulate_grad_batches=after
            )
            assert resumed.steps() == rest(uninterrupted, step)

    def test_short_epochs_go_on_in_the_ramp(self, cache: Path, uninterrupted: Recorder, tmp_path: Path) -> None:
        for arguments in ({}, {"reload_dataloaders_every_n_epochs": 1}):
            arguments |= {"limit_train_batches": 4, "accumulate_grad_batches": 2, "steps": STEPS}
            whole = fit(data_module(cache), tmp_path, **arguments)
            assert whole.steps() == uninterrupted.steps()
            for step in (3, 6, 7):
                resumed = fit(data_module(cache), resume=tmp_path / f"step={step}.ckpt", **arguments)
                assert resumed.steps() == rest(whole, step)

    def test_an_epoch_that_ends_inside_an_accumulation_loses_no_sample(
        self, cache: Path, uninterrupted: Recorder, tmp_path: Path
    ) -> None:
        """Lightning steps the optimizer at an epoch's last batch, here with one micro-batch of two."""
        arguments = {"limit_train_batches": 3, "accumulate_grad_batches": 2, "steps": 10}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*inside an optimizer step.*")
            whole = fit(data_module(cache), tmp_path, **arguments)
            stream_of_rows = [row for _, row in uninterrupted.rows]
            assert [row for _, row in whole.rows] == stream_of_rows[: len(whole.rows)]
            for step in range(1, 10):
                resumed = fit(data_module(cache), resume=tmp_path / f"step={step}.ckpt", **arguments)
                assert resumed.steps() == rest(whole, step)

    def test_a_checkpoint_from_inside_a_step_goes_on_inside_it(
        self, cache: Path, uninterrupted: Recorder, tmp_path: Path
    ) -> None:
        killed_inside_a_step(cache, tmp_path / "error.ckpt")
        with pytest.warns(UserWarning, match=r"1 of its 2 accumulated.*first step of this run misses them"):
            resumed = fit(
                data_module(cache, 2), tmp_path / "more", tmp_path / "error.ckpt", STEPS, accumulate_grad_batches=2
            )
        steps = rest(uninterrupted, 6)
        assert resumed.steps() == steps | {6: steps[6][4:]}
        again = fit(data_module(cache), resume=tmp_path / "more" / "step=8.ckpt", steps=STEPS)
        assert again.steps() == rest(uninterrupted, 8)

    def test_with_another_accumulation_that_step_is_taken_whole(
        self, cache: Path, uninterrupted: Recorder, tmp_path: Path
    ) -> None:
        killed_inside_a_step(cache, tmp_path / "error.ckpt")
        with pytest.warns(UserWarning, match=r"1 of its 2 accumulated.*begins with a whole step"):
            resumed = fit(data_module(cache), None, tmp_path / "error.ckpt", STEPS, accumulate_grad_batches=4)
        assert resumed.steps() == rest(uninterrupted, 6)

    @pytest.mark.distributed
    @pytest.mark.parametrize(("accumulate", "resume"), [(2, None), (1, 6)])
    def test_two_processes_see_what_one_sees(
        self, cache: Path, uninterrupted: Recorder, tmp_path: Path, accumulate: int, resume: int | None
    ) -> None:
        checkpoint = None
        if resume is not None:
            fit(data_module(cache), tmp_path, steps=STEPS, accumulate_grad_batches=4)
            checkpoint = tmp_path / f"step={resume}.ckpt"
        by_rank = run_on_ranks(2, train_on_ranks, str(cache), accumulate, checkpoint)
        for step, rows in rest(uninterrupted, resume or 0).items():
            assert sorted(by_rank[0][step] + by_rank[1][step]) == sorted(rows)
            assert len(by_rank[0][step]) == len(by_rank[1][step])

    def test_a_model_that_resumes_in_mid_ramp_is_bit_equal(self, cache: Path, tmp_path: Path) -> None:
        whole = train_model(cache, tmp_path / "whole", STEPS)
        assert whole.tokens_seen == SIZES.samples(STEPS - 1).stop * S
        train_model(cache, tmp_path / "part", 7)
        resumed = train_model(cache, tmp_path / "rest", STEPS, tmp_path / "part" / "last.ckpt")
        assert resumed.tokens_seen == whole.tokens_seen
        state = resumed.state_dict()
        assert [name for name, value in whole.state_dict().items() if not torch.equal(value, state[name])] == []


def train_on_ranks(cache: str, accumulate: int, resume: Path | None) -> dict[int, list[str]]:
    arguments: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": accumulate}
    return fit(data_module(cache), resume=resume, steps=STEPS, **arguments).steps()


def train_model(cache: Path, folder: Path, steps: int, resume: Path | None = None) -> DeepSeekV3Module:
    config = DeepSeekV3Config.from_preset(
        "tiny", vocab_size=512, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=8, q_lora_rank=16, kv_lora_rank=16,
    )  # fmt: skip
    torch.manual_seed(0)
    rate = [{"until": 50 * S, "value": 1e-2, "shape": "linear"}, {"until": 200 * S, "value": 1e-3, "shape": "cosine"}]
    module = DeepSeekV3Module(config, learning_rate=rate)
    trainer = L.Trainer(
        max_steps=steps, accumulate_grad_batches=2, callbacks=[AuxFreeBalanceCallback(update_rate=0.01)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data_module(cache), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


class TestCheckpoint:
    def test_other_batch_sizes_are_told_about_and_hold_from_the_saved_sample_on(
        self, cache: Path, tmp_path: Path
    ) -> None:
        fit(data_module(cache), tmp_path, steps=7)
        other = dataclasses.replace(SIZES, size=32)
        with pytest.warns(UserWarning, match=r"batch_size was .*'size': 16.* and is .*'size': 32.*at sample 36 "):
            resumed = fit(data_module(cache, 0, other), resume=tmp_path / "step=7.ckpt", steps=9)
        # Two of the steps that begin at sample 36 on the other ramp.
        assert [len(rows) for rows in resumed.steps().values()] == [20, 28]

    def test_a_checkpoint_that_says_nothing_of_batches_is_read_in_silence(self, cache: Path, tmp_path: Path) -> None:
        data = data_module(cache)
        data.setup()
        saved = data.train_dataloader()
        batches = iter(saved)
        for _ in range(6):
            next(batches)
        state = saved.state_dict()
        assert (state["samples"], state["batches_into_step"]) == (28, 0)
        del state["batches_into_step"], state["identity"]["batch_size"]
        resumed = data.train_dataloader()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(state)
        assert torch.equal(next(iter(resumed))["input_ids"], next(batches)["input_ids"])

    def test_the_state_is_plain_and_names_the_ramp(self, cache: Path) -> None:
        data = data_module(cache)
        data.setup()
        identity = data.train_dataloader().state_dict()["identity"]
        assert identity["batch_size"] == {"size": 16, "start": 4, "until": 960, "increment": 4}
        plain = data_module(cache, batch_size=8)
        plain.setup()
        assert plain.train_dataloader().state_dict()["identity"]["batch_size"] == 8


class TestErrors:
    @pytest.mark.parametrize(
        ("sizes", "processes", "accumulated", "message"),
        [
            (8, 1, 3, r"train\.batch_size=8: is all.*1 processes x 3 .*use train\.batch_size=9,"),
            (BatchSizes(16, BatchRamp(4, 9, 2)), 2, 2, r"through 6, which is.*2 processes x 2.*increment=4,"),
            (BatchSizes(16, BatchRamp(3, 9, 4)), 2, 2, r"through 3, which.*start=4 and .*increment=4,"),
            (BatchSizes(18, BatchRamp(4, 9, 4)), 4, 1, r"train\.batch_size=18: is all.*train\.batch_size=16,"),
            (BatchSizes(3, BatchRamp(1, 9, 1)), 8, 1, r"use train\.batch_size=8, .*start=8 and .*increment=8,"),
        ],
    )
    def test_a_size_that_cannot_be_dealt_out_names_sizes_that_can(
        self, sizes: int | BatchSizes, processes: int, accumulated: int, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            BatchSizes.of(sizes).check_shares(processes, accumulated)

    @given(ramps(), st.integers(1, 8), st.integers(1, 4))
    def test_the_sizes_that_it_names_can_be_dealt_out(
        self, sizes: BatchSizes, processes: int, accumulated: int
    ) -> None:
        try:
            sizes.check_shares(processes, accumulated)
        except ConfigError as error:
            fix = str(error).partition("; use ")[2].partition(", or change")[0].replace(" and ", ", ")
            values = {key.rpartition(".")[2]: int(value) for key, value in (p.split("=") for p in fix.split(", "))}
            ramp = BatchRamp(values["start"], sizes.ramp.until, values["increment"])
            BatchSizes(values["batch_size"], ramp, sizes.sequence_length).check_shares(processes, accumulated)
        else:
            assert all(size % (processes * accumulated) == 0 for size in sizes.sizes)

    def test_it_is_refused_before_the_first_batch(self, cache: Path) -> None:
        with pytest.raises(ConfigError, match=r"batch_ramp leads to it through 4, .*1 processes x 8"):
            fit(data_module(cache), accumulate_grad_batches=8)

    def test_a_ramp_for_another_sequence_length_is_refused(self, cache: Path) -> None:
        with pytest.raises(ConfigError, match=r"train\.sequence_length=16.*sequences of 8 tokens"):
            data_module(cache, batch_size=dataclasses.replace(SIZES, sequence_length=8))

    def test_the_place_of_a_new_stream_is_its_beginning(self) -> None:
        assert stream(SIZES).start == Position(0, (0, 0, 0))
