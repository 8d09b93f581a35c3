"""The data module in a real Trainer: what a step sees does not depend on how a run is cut up."""

import gc
import hashlib
import multiprocessing
import pickle
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_on_ranks

from lightning_dsv3.config import DataConfig
from lightning_dsv3.data import DeepSeekV3DataModule
from lightning_dsv3.data.loader import HeldOutBatches
from lightning_dsv3.data.packing import IGNORED_LABEL
from lightning_dsv3.data.tokenizer import token_texts

S, B, STEPS = 16, 8, 6
DOMAINS = ("plain", "han", "code")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*`val_check_interval`.*", "ignore:.*checkpoint.*not.*empty.*", "ignore:.*log_every_n_steps.*"
)


def texts(domain, number=40):
    words = {
        "plain": "so much depends upon a red wheel barrow",
        "han": "滚滚 长江 东逝 水 浪花",
        "code": "def x ( ) : return",
    }
    listed = words[domain].split()
    return [" ".join(listed[(i * j) % len(listed)] for j in range(3 + i % 17)) + f" {i}" for i in range(number)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(cache):
    def make(workers=0, val_windows=0, documents=None, batch_size=B, seed=0, weights=None, sequence_length=S):
        documents = documents or {domain: texts(domain) for domain in DOMAINS}
        config = DataConfig(
            weights=weights or dict.fromkeys(documents, 1.0),
            cache_dir=str(cache),
            num_workers=workers,
            val_windows=val_windows,
        )
        return DeepSeekV3DataModule(
            config,
            vocab_size=512,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            documents=documents,
        )

    return make


def fingerprint(*tensors):
    return hashlib.blake2b(b"".join(t.numpy().tobytes() for t in tensors), digest_size=8).hexdigest()


class Recorder(L.LightningModule):
    """Learns one number from the batches it sees and remembers which they were."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.rows = []
        self.fail_at = None

    def training_step(self, batch, batch_idx):
        if self.fail_at == (self.global_step, batch_idx):
            raise RuntimeError("killed")
        for row in range(len(batch["domain"])):
            seen = fingerprint(batch["input_ids"][row], batch["labels"][row], batch["domain"][row])
            self.rows.append((self.global_step, seen))
        return (self.weight * batch["input_ids"].float().mean() / 500).sin()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def steps(self):
        """Return the rows of every optimizer step, in order."""
        steps = {}
        for step, seen in self.rows:
            steps.setdefault(step, []).append(seen)
        return steps


def fit(data, folder=None, resume=None, steps=STEPS, fail_at=None, **arguments):
    module = Recorder()
    module.fail_at = fail_at
    callbacks = []
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last="link")
        )
    defaults = {"max_steps": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0, "logger": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(callbacks=callbacks, enable_checkpointing=folder is not None, **(defaults | arguments))
    try:
        trainer.fit(module, data, ckpt_path=resume)
    except RuntimeError as error:
        if str(error) != "killed":
            raise
    return module


@pytest.fixture(scope="module")
def uninterrupted(cache):
    """Every optimizer step's rows and the weight after the last, of a plain run in one process."""
    documents = {domain: texts(domain) for domain in DOMAINS}
    config = {"weights": dict.fromkeys(DOMAINS, 1.0), "cache_dir": str(cache)}
    module = fit(DeepSeekV3DataModule(config, vocab_size=512, sequence_length=S, batch_size=B, documents=documents))
    assert list(module.steps()) == list(range(STEPS))
    assert len({row for _, row in module.rows}) > 0.9 * STEPS * B
    return module


class TestBatches:
    def test_a_batch_has_rows_of_one_domain_each_with_text_of_that_domain(self, make):
        data = make()
        data.setup()
        for _, batch in zip(range(10), data.train_dataloader(), strict=False):
            assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
                "input_ids": (torch.int64, (B, S)),
                "labels": (torch.int64, (B, S)),
                "domain": (torch.int64, (B,)),
            }
            assert torch.equal(batch["input_ids"], batch["labels"])
            for ids, domain in zip(batch["input_ids"], batch["domain"], strict=True):
                text = data.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                alphabet = set("".join(texts(data.domains[domain]))) | {"\ufffd"}
                assert set(text) <= alphabet

    def test_the_shares_of_the_domains_are_the_weights(self, make):
        data = make(weights={"plain": 3, "han": 1, "code": 0})
        data.setup()
        assert data.domains == ["plain", "han"]
        batches = [batch["domain"] for _, batch in zip(range(200), data.train_dataloader(), strict=False)]
        counts = torch.bincount(torch.cat(batches), minlength=2)
        # Four standard deviations of 1600 draws.
        assert abs(counts[0] / 1600 - 0.75) < 4 * (0.75 * 0.25 / 1600) ** 0.5

    def test_after_setup_everything_is_there(self, make):
        data = make()
        assert not hasattr(data, "token_bytes")
        data.setup("fit")
        assert data.domains == list(DOMAINS)
        assert data.tokenizer.get_vocab_size() == len(data.token_bytes) == 512
        assert data.eos_token_id == 1
        reports = {report.domain: report for report in data.sources}
        for domain in DOMAINS:
            assert reports[domain].documents == 40
            assert reports[domain].text_bytes == sum(len(text.encode()) for text in texts(domain))
            splits = [data.num_tokens(domain, split) for split in ("train", "val", "test")]
            assert sum(splits) == reports[domain].tokens
            assert min(splits) > 0

    def test_training_text_is_not_held_out(self, make):
        data = make()
        data.setup()
        for domain in DOMAINS:
            table = data._tables[domain]["train"]
            trained = [table.tokens(i, 0, int(table.length[i])).tolist() for i in range(len(table))]
            outside = [text for text in texts(domain) if data.tokenizer.encode(text).ids not in trained]
            held_out = data.heldout_bytes(domain, "val") + data.heldout_bytes(domain, "test")
            assert sorted("".join(outside).encode()) == sorted(held_out)
            assert len(outside) + len(trained) == 40

    def test_another_seed_gives_another_order(self, make, uninterrupted):
        assert fit(make(seed=1), steps=1).steps()[0] != uninterrupted.steps()[0]

    def test_the_loader_can_be_used_without_a_trainer(self, make, uninterrupted):
        data = make()
        data.setup()
        loader = data.train_dataloader()
        batches = iter(loader)
        for step in range(3):
            batch = next(batches)
            rows = [fingerprint(*row) for row in zip(batch["input_ids"], batch["labels"], batch["domain"], strict=True)]
            assert rows == uninterrupted.steps()[step]
            assert loader.state_dict()["samples"] == (step + 1) * B


class TestOneOrderForEveryLayout:
    @pytest.mark.parametrize(("workers", "accumulate"), [(0, 2), (0, 8), (1, 1), (2, 1), (3, 2)])
    def test_workers_and_accumulation_change_nothing(self, make, uninterrupted, workers, accumulate):
        module = fit(make(workers), accumulate_grad_batches=accumulate)
        assert module.steps() == uninterrupted.steps()

    @pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (2, 2), (8, 1)])
    def test_ranks_share_the_rows_of_a_step(self, make, uninterrupted, world_size, accumulate):
        steps = [[] for _ in range(STEPS)]
        data = make()
        data.setup()
        loaders = [stream(data, accumulate, rank, world_size) for rank in range(world_size)]
        for step in range(STEPS):
            for _ in range(accumulate):
                for loader in loaders:
                    batch = next(loader)
                    assert len(batch["domain"]) == B // world_size // accumulate
                    together = zip(batch["input_ids"], batch["labels"], batch["domain"], strict=True)
                    steps[step] += [fingerprint(*row) for row in together]
        assert dict(enumerate(steps)) == uninterrupted.steps()

    @pytest.mark.distributed
    @pytest.mark.parametrize(("accumulate", "resume"), [(1, None), (2, None), (1, 2), (2, 3)])
    def test_two_processes_see_what_one_sees(self, make, cache, uninterrupted, tmp_path, accumulate, resume):
        """Also when they go on from a checkpoint of one process that accumulated twice."""
        if resume is not None:
            fit(make(), tmp_path, accumulate_grad_batches=2)
            resume = tmp_path / f"step={resume}.ckpt"
        by_rank = run_on_ranks(2, train_on_ranks, str(cache), accumulate, resume)
        for step, rows in by_rank[0].items():
            assert sorted(rows + by_rank[1][step]) == sorted(uninterrupted.steps()[step])
            assert len(rows) == B // 2
        assert list(by_rank[0]) == list(range((resume and int(resume.stem[5:])) or 0, STEPS))

    def test_a_stream_that_was_sent_to_another_process_gives_the_same(self, make):
        data = make()
        data.setup()
        stream = data.train_dataloader().dataset
        here, there = next(iter(stream)), next(iter(pickle.loads(pickle.dumps(stream))))
        assert all(torch.equal(here[name], there[name]) for name in here)


def stream(data, accumulate, rank, world_size):
    dataset = data.train_dataloader().dataset
    dataset.accumulate, dataset.rank, dataset.world_size = accumulate, rank, world_size
    return iter(dataset)


def train_on_ranks(cache, accumulate, resume):
    documents = {domain: texts(domain) for domain in DOMAINS}
    config = {"weights": dict.fromkeys(DOMAINS, 1.0), "cache_dir": cache}
    data = DeepSeekV3DataModule(config, vocab_size=512, sequence_length=S, batch_size=B, documents=documents)
    module = fit(data, resume=resume, devices=2, strategy="ddp", accumulate_grad_batches=accumulate)
    return module.steps()


class TestResume:
    """A checkpoint of every step, each resumed: the rest of the run is the same bit by bit."""

    @pytest.mark.parametrize(("before", "after", "accumulate"), [(0, 0, 1), (0, 2, 1), (2, 0, 2), (2, 3, 1), (0, 0, 2)])
    def test_every_step_can_be_resumed(self, make, uninterrupted, tmp_path, before, after, accumulate):
        whole = fit(make(before), tmp_path, accumulate_grad_batches=accumulate)
        assert whole.steps() == uninterrupted.steps()
        for step in range(1, STEPS):
            resumed = fit(make(after), resume=tmp_path / f"step={step}.ckpt", accumulate_grad_batches=accumulate)
            assert resumed.steps() == {k: rows for k, rows in whole.steps().items() if k >= step}
            assert torch.equal(resumed.weight, whole.weight)

    @pytest.mark.parametrize("every", [2, 3])
    def test_validation_in_between_changes_nothing(self, make, uninterrupted, tmp_path, every):
        arguments = {"limit_val_batches": 1.0, "val_check_interval": every, "check_val_every_n_epoch": None}
        whole = fit(make(), tmp_path, **arguments)
        assert whole.steps() == uninterrupted.steps()
        for step in range(1, STEPS):
            resumed = fit(make(), resume=tmp_path / f"step={step}.ckpt", **arguments)
            assert resumed.steps() == {k: rows for k, rows in whole.steps().items() if k >= step}
            assert torch.equal(resumed.weight, whole.weight)

    def test_a_checkpoint_saved_by_validation_resumes(self, make, uninterrupted, tmp_path):
        arguments = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}

        class SavesAfterValidation(L.Callback):
            def on_validation_end(self, trainer, module):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

        trainer = L.Trainer(
            max_steps=STEPS, callbacks=[SavesAfterValidation()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, accelerator="cpu",
            **arguments,
        )  # fmt: skip
        trainer.fit(Recorder(), make())
        resumed = fit(make(), resume=tmp_path / "4.ckpt", **arguments)
        assert resumed.steps() == {k: rows for k, rows in uninterrupted.steps().items() if k >= 4}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_killed_run_goes_on(self, make, uninterrupted, tmp_path, workers):
        killed = fit(make(workers), tmp_path, fail_at=(3, 3))
        assert list(killed.steps()) == [0, 1, 2]
        resumed = fit(make(workers), resume=tmp_path / "last.ckpt")
        assert resumed.steps() == {k: rows for k, rows in uninterrupted.steps().items() if k >= 3}
        assert torch.equal(resumed.weight, uninterrupted.weight)

    def test_a_checkpoint_from_inside_a_step_repeats_that_step(self, make, uninterrupted, tmp_path):
        class SavesOnError(L.Callback):
            def on_exception(self, trainer, module, exception):
                trainer.save_checkpoint(tmp_path / "error.ckpt")

        module = Recorder()
        module.fail_at = (3, 3)
        trainer = L.Trainer(
            max_steps=STEPS, callbacks=[SavesOnError()], logger=False, enable_checkpointing=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit(module, make())
        resumed = fit(make(), resume=tmp_path / "error.ckpt")
        assert resumed.steps() == {k: rows for k, rows in uninterrupted.steps().items() if k >= 3}
        assert torch.equal(resumed.weight, uninterrupted.weight)

    @pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (1, 8)])
    def test_another_accumulation_goes_on_at_whole_steps(self, make, uninterrupted, tmp_path, before, after):
        fit(make(), tmp_path, steps=3, accumulate_grad_batches=before)
        resumed = fit(make(), resume=tmp_path / "step=3.ckpt", accumulate_grad_batches=after)
        assert resumed.steps() == {k: rows for k, rows in uninterrupted.steps().items() if k >= 3}

    def test_a_resume_of_a_resume(self, make, uninterrupted, tmp_path):
        fit(make(), tmp_path / "a", steps=2)
        fit(make(2), tmp_path / "b", resume=tmp_path / "a" / "step=2.ckpt", steps=4)
        resumed = fit(make(), resume=tmp_path / "b" / "step=4.ckpt")
        assert resumed.steps() == {k: rows for k, rows in uninterrupted.steps().items() if k >= 4}

    def test_short_epochs_go_on_in_the_stream(self, make, uninterrupted, tmp_path):
        """limit_train_batches makes Lightning ask for an iterator again at every epoch."""
        whole = fit(make(), tmp_path, limit_train_batches=2)
        assert whole.steps() == uninterrupted.steps()
        for step in range(1, STEPS):
            resumed = fit(make(), resume=tmp_path / f"step={step}.ckpt", limit_train_batches=2)
            assert resumed.steps() == {k: rows for k, rows in whole.steps().items() if k >= step}

    def test_loaders_made_anew_go_on_in_the_stream(self, make, uninterrupted):
        whole = fit(make(), limit_train_batches=2, reload_dataloaders_every_n_epochs=1)
        assert whole.steps() == uninterrupted.steps()

    def test_a_new_trainer_starts_anew(self, make, uninterrupted):
        data = make()
        fit(data, steps=2)
        assert fit(data, steps=2).steps() == {k: uninterrupted.steps()[k] for k in range(2)}

    def test_a_checkpoint_loads_weights_only(self, make, tmp_path):
        fit(make(), tmp_path, steps=3)
        checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
        (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert state["samples"] == sum(state["windows"].values()) == 3 * B

    def test_other_data_are_told_about(self, make, tmp_path):
        fit(make(), tmp_path, steps=3)
        with pytest.warns(UserWarning, match=r"seed was 0 and is 1.*sample 24"):
            fit(make(seed=1), resume=tmp_path / "step=3.ckpt", steps=4)

    def test_another_mixture_repeats_no_window(self, make):
        # Text in which no two windows are alike.
        documents = {
            domain: [" ".join(f"{domain[0]}{17 * i + j}" for j in range(20)) for i in range(0, 200, 2)]
            for domain in DOMAINS
        }
        data = make(documents=documents)
        data.setup()
        loader = data.train_dataloader()
        seen = rows_of(loader, 10)
        other = make(documents=documents, weights={"plain": 5, "han": 1, "code": 1})
        other.setup()
        resumed = other.train_dataloader()
        with pytest.warns(UserWarning, match="weights"):
            resumed.load_state_dict(loader.state_dict())
        assert resumed.state_dict()["windows"] == loader.state_dict()["windows"]
        assert not seen & rows_of(resumed, 10)

    def test_the_same_data_are_silent(self, make, tmp_path):
        fit(make(), tmp_path, steps=3)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*training data.*")
            fit(make(2), resume=tmp_path / "step=3.ckpt", steps=4)


def rows_of(loader, batches):
    taken = zip(range(batches), loader, strict=False)
    return {fingerprint(ids) for _, batch in taken for ids in batch["input_ids"]}


class TestHeldOut:
    @pytest.mark.parametrize("split", ["val", "test"])
    @pytest.mark.parametrize("val_windows", [0, 3])
    def test_the_targets_are_the_held_out_bytes(self, make, split, val_windows):
        data = make(val_windows=val_windows)
        data.setup()
        texts_of_ids = token_texts(data.tokenizer)
        spelled = dict.fromkeys(range(3), b"")
        for batch in getattr(data, f"{split}_dataloader")():
            assert len(set(batch["domain"].tolist())) == 1
            for labels, domain in zip(batch["labels"], batch["domain"].tolist(), strict=True):
                spelled[domain] += b"".join(texts_of_ids[i] for i in labels[1:].tolist() if i != IGNORED_LABEL)
        for index, domain in enumerate(data.domains):
            assert spelled[index] == data.heldout_bytes(domain, split)
            if val_windows == 0 or split == "test":
                documents = {text.encode() for text in texts(domain)}
                assert any(spelled[index].startswith(text) for text in documents)

    def test_validation_is_the_same_every_time(self, make):
        data = make(val_windows=5)
        data.setup()
        first, second = ([batch["input_ids"].tolist() for batch in data.val_dataloader()] for _ in range(2))
        assert first == second

    def test_the_limit_is_per_domain(self, make):
        data = make(val_windows=2)
        data.setup()
        domains = torch.cat([batch["domain"] for batch in data.val_dataloader()])
        assert torch.bincount(domains).tolist() == [2, 2, 2]

    @pytest.mark.parametrize("world_size", [2, 3, 7])
    def test_ranks_share_the_windows(self, make, world_size):
        data = make()
        data.setup()
        windows = data._held_out_windows("val")
        alone = [row for batch in HeldOutBatches(windows, rows=4) for row in rows_with_targets(batch)]
        shares = [HeldOutBatches(windows, rows=4, rank=r, world_size=world_size) for r in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert all(1 <= len(batch["domain"]) <= 4 for share in shares for batch in share)
        # Every rank is in the same domain at the same time.
        for batches in zip(*shares, strict=True):
            assert len({int(batch["domain"][0]) for batch in batches}) == 1
        together = [row for share in shares for batch in share for row in rows_with_targets(batch)]
        assert sorted(together) == sorted(alone)

    def test_one_document_is_for_training(self, make):
        data = make(documents={"novel": ["word " * 100]})
        with pytest.warns(UserWarning, match="'novel' has one document only"):
            data.setup()
        assert data.val_dataloader() == []
        assert data.heldout_bytes("novel") == b""
        assert len(fit(make(documents={"novel": ["word " * 100]}), steps=1, limit_val_batches=1.0).rows) == B

    def test_an_unknown_split_is_refused(self, make):
        data = make()
        data.setup()
        with pytest.raises(ValueError, match="'val' or 'test'"):
            data.heldout_bytes("plain", "train")


def rows_with_targets(batch):
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [fingerprint(ids, labels) for ids, labels in rows if (labels[1:] != IGNORED_LABEL).any()]


def test_workers_end_with_the_run(make):
    before = len(multiprocessing.active_children())
    fit(make(2), steps=2)
    gc.collect()
    assert len(multiprocessing.active_children()) == before
