"""Any kind of checkpoint gives the model that was trained, with its tokenizer, and nothing in a file is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import run_on_ranks
from saved_models import plain_greedy, save_hf, save_sharded, trained_run
from tiny_run import quiet_trainer, tiny_data, tiny_module
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import fully_shard

from lightning_dsv3.checkpoint import CheckpointError, LoadedModel, load_for_inference
from lightning_dsv3.data.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, load_tokenizer, save_tokenizer
from lightning_dsv3.inference import generate
from lightning_dsv3.layers.router import Router

TEXT = "The 5th of the old songs"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run, and its checkpoint in every form."""
    folder = tmp_path_factory.mktemp("saved")
    run, model = trained_run(folder / "runs")
    last = run / "checkpoints" / "last.ckpt"
    return SimpleNamespace(
        model=model,
        run=run,
        ckpt=last,
        alone=Path(shutil.copy(last, folder / "alone.ckpt")),
        sharded=save_sharded(last, folder / "sharded" / "checkpoints" / "last.ckpt", "state_dict"),
        fsdp=save_sharded(last, folder / "fsdp", "model"),
        hf=save_hf(run, model, folder / "hf"),
    )


KINDS = ["run", "ckpt", "alone", "sharded", "fsdp", "hf"]


def biases(model: torch.nn.Module) -> list[torch.Tensor]:
    return [module.bias for module in model.modules() if isinstance(module, Router)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_model_that_was_trained(kind: str, saved: SimpleNamespace) -> None:
    loaded = load_for_inference(getattr(saved, kind))
    assert loaded.model.config == saved.model.config
    state, trained = loaded.model.state_dict(), saved.model.state_dict()
    assert state.keys() == trained.keys()
    for name, tensor in trained.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert any(bias.abs().max() > 0 for bias in biases(loaded.model))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.eos_token_ids, loaded.bos_token_id, loaded.pad_token_id) == (
        (EOS_TOKEN_ID,), BOS_TOKEN_ID, PAD_TOKEN_ID,
    )  # fmt: skip
    ids = load_tokenizer(300).encode(TEXT).ids
    prefix = [] if kind == "hf" else [EOS_TOKEN_ID]  # as packing puts it before every document
    assert loaded.encode(TEXT) == prefix + ids
    assert loaded.decode([EOS_TOKEN_ID, *ids]) == TEXT
    new = generate(loaded.model, torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :].tolist()
    assert new == plain_greedy(saved.model, ids, 12)
    assert len(set(new)) > 2, "a model that says the same all the time shows nothing"


@pytest.mark.parametrize("kind", ["ckpt", "sharded", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_weights_come_in_another_dtype_and_the_bias_does_not(kind: str, dtype: Any, saved: SimpleNamespace) -> None:
    state = load_for_inference(getattr(saved, kind), dtype=dtype).model.state_dict()
    for name, tensor in saved.model.state_dict().items():
        wanted = tensor if name.endswith("router.bias") else tensor.to(torch.bfloat16)
        assert state[name].dtype == wanted.dtype
        assert torch.equal(state[name], wanted), name


@pytest.mark.parametrize("kind", ["alone", "sharded"])
def test_a_bias_that_was_stored_in_low_precision_is_float32(kind: str, saved: SimpleNamespace, tmp_path: Path) -> None:
    values = torch.load(saved.ckpt, weights_only=True)
    values["state_dict"] = {name: tensor.bfloat16() for name, tensor in values["state_dict"].items()}
    path = tmp_path / "low.ckpt"
    torch.save(values, path)
    if kind == "sharded":
        path = save_sharded(path, tmp_path / "sharded", "state_dict")
    model = load_for_inference(path).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {bias.dtype for bias in biases(model)} == {torch.float32}


def test_a_run_folder_gives_its_last_checkpoint_or_else_the_newest(saved: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for age, name in enumerate(["step-9.ckpt", "last.ckpt", "step-10.ckpt"]):
        path = Path(shutil.copy(saved.ckpt, folder / name))
        os.utime(path, (1000 - age, 1000 - age))
    assert load_for_inference(tmp_path / "run").checkpoint == folder / "last.ckpt"
    (folder / "last.ckpt").unlink()
    assert load_for_inference(tmp_path / "run").checkpoint == folder / "step-9.ckpt"
    assert load_for_inference(folder).checkpoint == folder / "step-9.ckpt"
    shutil.copytree(saved.sharded, folder / "last.ckpt")
    assert load_for_inference(tmp_path / "run").checkpoint == folder / "last.ckpt"


def test_a_checkpoint_may_be_written_over_once_it_is_loaded(saved: SimpleNamespace, tmp_path: Path) -> None:
    path = Path(shutil.copy(saved.ckpt, tmp_path))
    state = load_for_inference(path).model.state_dict()
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    run, model = trained_run(tmp_path / "runs", tie_word_embeddings=True)
    last = run / "checkpoints" / "last.ckpt"
    for path in (last, save_sharded(last, tmp_path / "sharded", "state_dict"), save_hf(run, model, tmp_path / "hf")):
        loaded = load_for_inference(path).model
        assert loaded.head.weight is loaded.embedding.weight
        assert torch.equal(loaded.head.weight, model.head.weight)


def test_of_averaged_weights_the_averages_are_taken_with_the_bias_as_it_is(tmp_path: Path) -> None:
    run, _ = trained_run(tmp_path, EMAWeightAveraging(decay=0.5))
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    # What the last checkpoint of such a run holds at its end, the module has by then taken over; one in its middle does
    # not, so it is made here.
    saved["current_model_state"] = saved["state_dict"]
    saved["state_dict"] = {
        name: tensor if name.endswith("router.bias") else tensor + 1 for name, tensor in saved["state_dict"].items()
    }
    torch.save(saved, tmp_path / "middle.ckpt")
    loaded = load_for_inference(tmp_path / "middle.ckpt")
    assert loaded.averaged
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, saved["state_dict"][f"model.{name}"])


def sharded_run(folder: str) -> dict[str, torch.Tensor]:
    """Train on two ranks with FSDP2 and save; return the whole weights."""
    base = type(tiny_module())

    class Sharded(base):
        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for block in [*self.model.blocks, *self.model.mtp]:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    torch.manual_seed(0)
    module = Sharded(tiny_module().model.config)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = quiet_trainer(strategy=strategy, devices=2, max_steps=1, limit_val_batches=0)
    trainer.fit(module, tiny_data())
    trainer.save_checkpoint(Path(folder) / "last.ckpt")
    state = module.model.state_dict()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


@pytest.mark.distributed
def test_what_a_sharding_strategy_wrote_is_put_together(tmp_path: Path) -> None:
    whole, _ = run_on_ranks(2, sharded_run, str(tmp_path))
    assert (tmp_path / "last.ckpt" / ".metadata").is_file()
    assert len(list((tmp_path / "last.ckpt").glob("*.distcp"))) == 2
    loaded = load_for_inference(tmp_path / "last.ckpt").model.state_dict()
    assert loaded.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(loaded[name], tensor), name


def test_loading_does_without_lightning(saved: SimpleNamespace) -> None:
    paths = [str(getattr(saved, kind)) for kind in ("run", "fsdp", "hf")]
    program = (
        "import sys; from lightning_dsv3.checkpoint import load_for_inference\n"
        "for path in sys.argv[2:]: load_for_inference(path, tokenizer=sys.argv[1])\n"
        "print([name for name in ('lightning', 'pytorch_lightning') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(saved.run / "tokenizer.json"), *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Text


def test_a_tokenizer_that_is_named_comes_before_the_one_beside(saved: SimpleNamespace, tmp_path: Path) -> None:
    save_tokenizer(load_tokenizer(280), tmp_path / "tokenizer.json")
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_for_inference(saved.run, tokenizer=given)
        assert loaded.tokenizer.get_vocab_size() == 280
        assert loaded.tokenizer_source == str(tmp_path / "tokenizer.json")
    assert load_for_inference(saved.run).tokenizer_source == str(saved.run / "tokenizer.json")
    assert "DeepSeek's, cut to 300 ids" in load_for_inference(saved.alone).tokenizer_source


def test_a_special_tokens_name_is_text_as_in_training(saved: SimpleNamespace) -> None:
    for path in (saved.run, saved.alone):
        loaded = load_for_inference(path)
        ids = loaded.encode(f"a{EOS}")
        assert ids.count(EOS_TOKEN_ID) == 1
        assert loaded.decode(ids) == f"a{EOS}"


def hf_text(saved: SimpleNamespace, folder: Path, template: bool = False, **config: Any) -> LoadedModel:
    """Load the Hugging Face folder with another tokenizer_config.json."""
    shutil.copytree(saved.hf, folder, dirs_exist_ok=True)
    if template:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        save_tokenizer(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS} | config))
    return load_for_inference(folder)


@pytest.mark.parametrize("template", [True, False])
def test_a_hugging_face_folder_encodes_as_transformers(saved: SimpleNamespace, tmp_path: Path, template: bool) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = hf_text(saved, tmp_path, template, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, f"a{EOS}b", "\u00e9\U0001f600 \n"):
        assert loaded.encode(text) == theirs(text).input_ids
    assert loaded.eos_token_ids == (theirs.eos_token_id,)
    assert loaded.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_add_bos_token_says_what_stands_first(
    saved: SimpleNamespace, tmp_path: Path, template: bool, add: bool
) -> None:
    loaded = hf_text(saved, tmp_path, template, add_bos_token=add)
    ids = load_tokenizer(300).encode("ab").ids
    assert loaded.encode("ab") == ([BOS_TOKEN_ID, *ids] if add else ids)
    assert loaded.encode("") == [BOS_TOKEN_ID]


def test_an_empty_prompt_is_the_end_that_stands_before_a_document(saved: SimpleNamespace) -> None:
    assert load_for_inference(saved.run).encode("") == [EOS_TOKEN_ID]


def test_the_ends_of_a_text_are_those_that_the_files_name(saved: SimpleNamespace, tmp_path: Path) -> None:
    assert hf_text(saved, tmp_path, eos_token={"content": "!"}).eos_token_ids == (3,)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 5, "pad_token_id": 6}))
    loaded = load_for_inference(tmp_path)
    assert (loaded.eos_token_ids, loaded.pad_token_id) == ((5,), 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load_for_inference(tmp_path).eos_token_ids == (1, 7)


def test_a_tokenizer_of_another_family_has_the_ends_that_it_names(saved: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = load_for_inference(saved.alone, tokenizer=tmp_path)
    assert (loaded.eos_token_ids, loaded.bos_token_id, loaded.prefix) == ((), None, ())
    with pytest.raises(ValueError, match="prompt is empty"):
        loaded.encode("")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    loaded = load_for_inference(saved.alone, tokenizer=tmp_path)
    assert (loaded.eos_token_ids, loaded.encode("b")) == ((2,), [2, 1])


# What cannot be loaded


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_nothing_in_a_file_is_run(saved: SimpleNamespace, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"hyper_parameters": Runs(mark)}, tmp_path / "bad.ckpt")
    for name in ("meta.pt", ".metadata"):
        shutil.copytree(saved.fsdp, tmp_path / name)
    torch.save(Runs(mark), tmp_path / "meta.pt" / "meta.pt")
    (tmp_path / ".metadata" / ".metadata").write_bytes(pickle.dumps(Runs(mark)))
    for path in (tmp_path / "bad.ckpt", tmp_path / "meta.pt", tmp_path / ".metadata"):
        with pytest.raises(CheckpointError, match="which is not loaded, as unpickling it could run anything") as info:
            load_for_inference(path)
        assert str(path) in str(info.value)
        assert not mark.exists()
    pickle.loads((tmp_path / ".metadata" / ".metadata").read_bytes())
    assert mark.exists(), "the test's own pickle would have done nothing"


def test_ctrl_c_while_shards_are_read_is_ctrl_c(saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch wraps whatever ends a load in an exception of its own.
    monkeypatch.setattr(FileSystemReader, "read_data", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        load_for_inference(saved.sharded)


def truncated(saved: SimpleNamespace, path: Path) -> None:
    path.write_bytes(saved.ckpt.read_bytes()[:5000])


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[SimpleNamespace, Path], None]:
    def write(saved: SimpleNamespace, path: Path) -> None:
        values = torch.load(saved.ckpt, weights_only=True)
        replaced = change(values)
        torch.save(values if replaced is None else replaced, path)

    return write


def sharded(change: Callable[[Path], Any]) -> Callable[[SimpleNamespace, Path], None]:
    def write(saved: SimpleNamespace, path: Path) -> None:
        shutil.copytree(saved.fsdp, path)
        change(path)

    return write


def hf(change: Callable[[Path], Any]) -> Callable[[SimpleNamespace, Path], None]:
    def write(saved: SimpleNamespace, path: Path) -> None:
        shutil.copytree(saved.hf, path)
        change(path)

    return write


def json_with(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


HEAD = "model.head.weight"
BROKEN: dict[str, tuple[Callable[[SimpleNamespace, Path], Any], str]] = {
    "nothing there": (lambda saved, path: None, "no such file or folder; give a .ckpt"),
    "empty folder": (lambda saved, path: path.mkdir(), "not written to its end"),
    "no checkpoint": (lambda saved, path: (path / "checkpoints").mkdir(parents=True), "not written to its end"),
    "truncated": (truncated, "is damaged, unfinished, or no checkpoint"),
    "empty file": (lambda saved, path: path.touch(), "is damaged, unfinished, or no checkpoint"),
    "text": (lambda saved, path: path.write_text("hello " * 50), "is damaged, unfinished, or no checkpoint"),
    "another zip": (lambda saved, path: zipfile.ZipFile(path, "w").close(), "cannot be read"),
    "no dict": (changed(lambda values: [1]), "holds a list"),
    "foreign": (changed(lambda v: v["hyper_parameters"].pop("config") and None), "not of a DeepSeekV3Module"),
    "no hyperparameters": (changed(lambda v: v.pop("hyper_parameters") and None), "not of a DeepSeekV3Module"),
    "unknown field": (changed(lambda v: v["hyper_parameters"]["config"].update(x=1)), "hyper_parameters.config.*x"),
    "no weights": (changed(lambda v: v.pop("state_dict") and None), "has no state_dict"),
    "missing": (changed(lambda v: v["state_dict"].pop(HEAD) is None or None), f"{HEAD} is missing"),
    "unexpected": (
        changed(lambda v: v["state_dict"].update({"model.x": torch.ones(1)})), "model.x is not expected",
    ),
    "shape": (
        changed(lambda v: v["state_dict"].update({HEAD: torch.ones(3, 4)})), r"\[3, 4\] .*asks for \[300, 32\]",
    ),
    "dtype": (
        changed(lambda v: v["state_dict"].update({HEAD: v["state_dict"][HEAD].to(torch.int8)})), "dtype torch.int8",
    ),
    "sharded, no meta.pt": (sharded(lambda path: (path / "meta.pt").unlink()), "meta.pt: is missing"),
    "sharded, metadata cut": (
        sharded(lambda p: (p / ".metadata").write_bytes((p / ".metadata").read_bytes()[:300])), "metadata: cannot be",
    ),
    "sharded, other metadata": (
        sharded(lambda p: (p / ".metadata").write_bytes(pickle.dumps({}))), "is not metadata",
    ),
    "sharded, no data": (sharded(lambda p: [f.unlink() for f in p.glob("*.distcp")]), "cannot be read .*No such file"),
    "sharded, data cut": (
        sharded(lambda p: [f.write_bytes(f.read_bytes()[:2000]) for f in p.glob("*.distcp")]), "cannot be read",
    ),
    "hf, no tokenizer": (hf(lambda p: (p / "tokenizer.json").unlink()), "has no tokenizer.json"),
    "hf, bad tokenizer": (hf(lambda p: (p / "tokenizer.json").write_text("{}")), "cannot be read as a tokenizer"),
    "hf, end": (hf(lambda p: json_with(p / "config.json", eos_token_id=300)), "eos_token_id=300 is no token from 0"),
    "hf, other model": (hf(lambda p: json_with(p / "config.json", model_type="deepseek_v4")), "config.json: .*V4"),
    "hf, bad json": (hf(lambda p: (p / "generation_config.json").write_text("[")), "generation_config.json: cannot be"),
    "hf, no object": (hf(lambda p: (p / "tokenizer_config.json").write_text("[]")), "must hold an object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_loaded_is_one_error(kind: str, saved: SimpleNamespace, tmp_path: Path) -> None:
    write, message = BROKEN[kind]
    path = tmp_path / "bad.ckpt"
    write(saved, path)
    with pytest.raises(CheckpointError, match=message) as info:
        load_for_inference(path)
    assert str(path) in str(info.value)


def test_arguments_that_cannot_be_are_one_error(saved: SimpleNamespace, tmp_path: Path) -> None:
    for arguments, message in {
        ("dtype", "int8"): "dtype='int8': is not one of float32, bfloat16",
        ("device", "abacus"): "device='abacus': cannot be used here",
        ("tokenizer", tmp_path): "tokenizer.json is not there",
        ("tokenizer", tmp_path / "no.json"): "no.json is not there",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load_for_inference(saved.run, **dict([arguments]))
    with pytest.raises(CheckpointError, match="give its folder"):
        load_for_inference(saved.hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .*checkpoints/\*\.ckpt"):
        load_for_inference(tmp_path)
    save_tokenizer(load_tokenizer(301), tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"ids up to 300, and the model .* vocab_size=300"):
        load_for_inference(saved.run, tokenizer=tmp_path)


def test_a_vocabulary_that_deepseeks_tokenizer_has_not_needs_one(tmp_path: Path, saved: SimpleNamespace) -> None:
    values = torch.load(saved.ckpt, weights_only=True)
    values["hyper_parameters"]["config"]["vocab_size"] = 100
    for name in ("model.head.weight", "model.embedding.weight"):
        values["state_dict"][name] = values["state_dict"][name][:100].clone()
    torch.save(values, tmp_path / "small.ckpt")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json is beside it .*give tokenizer=FILE"):
        load_for_inference(tmp_path / "small.ckpt")
