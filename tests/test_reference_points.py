"""The reference points on made-up records and tiny models: all parts run, hang together, and a wrong answer is said."""

import json
import math
import os
import sys
from types import SimpleNamespace

import choice_records
import datasets
import generation_records
import pytest
import torch
from conftest import ROOT

pytest.importorskip("lm_eval")
import lm_eval.evaluator
import transformers
from saved_models import trained_run
from tokenizers import Tokenizer

from lightning_dsv3.data import load_tokenizer, save_tokenizer
from lightning_dsv3.data.corpus import given_documents

MODULES = (
    "reference_points",
    "reference_points_model",
    "reference_points_runs",
    "reference_points_table",
    "train_step",
)
POEM = "At the old gate the songs of the seven mills are sung. " * 8
TEXTS = [f"{POEM}{number}: 山外青山楼外楼。" for number in range(6)]


@pytest.fixture
def points(monkeypatch):
    """The benchmark, on records and texts of ours."""
    splits = {**choice_records.hub(), **generation_records.hub()}

    def load(path, name=None, *, split="test", data_files=None, **_):
        return splits[data_files[split][0] if data_files else path, name, split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.delenv("LIGHTNING_DSV3_DATA", raising=False)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import reference_points

    # A description of this machine, which takes two seconds for every task.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(reference_points, "coverage", lambda _: SimpleNamespace(present=("en", "zh")))
    source = given_documents("prose", TEXTS)
    monkeypatch.setattr(reference_points, "DOMAINS", ("prose",))
    monkeypatch.setattr(reference_points, "default_corpus", lambda *_: ([source], []))
    monkeypatch.setattr(reference_points, "TEXTS", {"songs": (source.name, next(source.read()).id)})
    monkeypatch.setattr(reference_points, "LONGER", "songs")
    monkeypatch.setattr(reference_points, "NOVEL", source.name)
    monkeypatch.setattr(reference_points, "TEXT_TOKENS", 20)
    monkeypatch.setattr(reference_points, "WINDOW", 96)
    yield reference_points
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose model has seen an end of sentence before every text."""
    return trained_run(tmp_path_factory.mktemp("runs"), vocab_size=320, max_position_embeddings=288)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of another kind in a folder, in place of the one that is fetched."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = load_tokenizer(320)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    names = {name: tokenizer.id_to_token(index) for index, name in enumerate(("bos_token", "eos_token", "pad_token"))}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


FEW = ["--limit", "2", "--new-tokens", "4", "--threads", "1"]


def parts_of(points, path, *words):
    points.main([*words, *FEW, "--output", str(path)])
    return json.loads(path.read_text())["parts"]


def test_our_model_and_hf_say_the_same_of_equal_weights(points, run, tmp_path, monkeypatch):
    monkeypatch.setattr(points, "TRAINED", points.TRAINED[:1])
    monkeypatch.setattr(points, "SUBJECTS", points.SUBJECTS[:1])
    monkeypatch.setattr(points, "SAMPLE", (points.SAMPLE[0], points.SAMPLE[2]))
    path = tmp_path / "results" / "points.json"
    names = ["trained", "trained_subjects", "trained_generation", "trained_texts", "same_weights"]
    parts = parts_of(points, path, "--checkpoint", str(run), "--parts", *reversed(names))
    assert list(parts) == names

    (ccpm,), (cmmlu,) = parts["trained"]["rows"], parts["trained_subjects"]["rows"]
    assert (ccpm["task"], ccpm["records"], ccpm["chance"], ccpm["beyond_window"]) == ("dsv3_ccpm", 2, 0.25, 0)
    # Five worked examples are longer than 288 tokens of such a vocabulary.
    assert (cmmlu["shots"], cmmlu["beyond_window"]) == (5, 2)
    languages = parts["trained_generation"]["rows"]
    assert [row["task"] for row in languages] == ["dsv3_mgsm_en", "dsv3_mgsm_zh"]
    assert all(row["metric"] == "exact_match" and row["chance"] is None for row in languages)
    held_out, in_seen_windows = parts["trained_texts"]["rows"]
    assert (held_out["window"], in_seen_windows["window"]) == (288, 256)
    assert held_out["bytes"] == in_seen_windows["bytes"]
    assert held_out["bits_per_byte"] != in_seen_windows["bits_per_byte"]
    # Of six documents one is a test set.
    assert (held_out["documents"], held_out["bytes"]) == (1, len(TEXTS[0].encode()))
    assert held_out["validation"] is None
    assert 0 < held_out["bits_per_byte"] < 50

    *choices, text, documents = parts["same_weights"]["rows"]
    for row in choices:
        assert row["ours"] == row["hf"]
        assert row["difference"] < 1e-3
        assert row["requests"] == 4 * row["records"] == 8
    assert text["equal_texts"] == 1.0
    assert documents["ours"] == pytest.approx(held_out["bits_per_byte"])
    assert documents["hf"] == pytest.approx(documents["ours"], abs=1e-4)

    table = path.with_suffix(".md").read_text()
    assert f"| dsv3_ccpm | 0 | 2 of {ccpm['of']} (partial: {ccpm['of']} of 2720) | acc_ppl " in table
    assert "100% of 2 texts equal" in table


def test_bits_per_byte_are_the_same_three_times(points, llama, tmp_path):
    parts = parts_of(points, tmp_path / "points.json", "--pretrained", str(llama), "--parts", "pretrained_texts")
    beginning, whole = parts["pretrained_texts"]["rows"]
    assert 15 <= beginning["tokens"] <= 20
    assert beginning["windows"] == 1 < whole["windows"]
    for row in (beginning, whole):
        assert row["difference"] < 1e-4
    assert whole["bytes"] == len(TEXTS[0].encode())

    # By hand, from the definition: windows do not overlap but for the last, which reaches back.
    model = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    ids = Tokenizer.from_file(str(llama / "tokenizer.json")).encode(TEXTS[0]).ids
    bits = 0.0
    with torch.no_grad():
        for position, token in enumerate(ids):
            start = min(position // 96 * 96, max(0, len(ids) - 96))
            seen = [0, *ids][start : position + 1]
            bits -= model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[token].item() / math.log(2)
    assert whole["task"] == pytest.approx(bits / whole["bytes"], abs=1e-4)


def test_chance_is_of_each_record_and_shots_are_those_asked_for(points, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(points, "PRETRAINED", (points.Asked("dsv3_piqa"), points.Asked("dsv3_arc_easy_cloze", 3, 0)))
    path = tmp_path / "points.json"
    path.write_text(json.dumps({"parts": {"dummies": KEPT}}))
    parts = parts_of(points, path, "--pretrained", str(llama), "--parts", "pretrained")
    assert parts["dummies"] == KEPT  # what is not run is kept
    piqa, arc = parts["pretrained"]["rows"]
    assert piqa["chance"] == 0.5
    assert arc["shots"] == 0
    assert arc["chance"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert set(arc["metrics"]) > {"acc_uncond", "acc", "acc_norm", "bpb"}


def test_above_chance_is_told_in_standard_errors(points):
    row = {"metrics": {"acc": {"value": 0.5, "stderr": 0.05}}, "chance": 0.25}
    assert points.above_chance(row) == pytest.approx(5.0)
    assert points.above_chance({**row, "chance": None}) is None
    assert points.above_chance({**row, "metrics": {"acc": {"value": 1.0, "stderr": 0.0}}}) is None


KEPT = {"command": "before", "versions": {}, "model": "none", "rows": []}


def test_dummies_say_what_stands_in_the_data(points, tmp_path):
    parts = parts_of(points, tmp_path / "points.json", "--parts", "dummies")
    shortest, c3, frequent, _ = parts["dummies"]["rows"]
    assert shortest["task"] == "dsv3_ccpm, the shortest"
    assert c3["beyond_window"] is None

    def share(say):
        docs = choice_records.CCPM[:2]
        return sum(max(range(4), key=lambda n: say(doc["choices"][n])) == doc["answer"] for doc in docs) / 2

    novel = "".join(TEXTS)
    assert shortest["metrics"]["acc"]["value"] == share(lambda text: -len(text))
    known = {c: (novel.count(c) + 0.5) / len(novel) for doc in choice_records.CCPM for c in "".join(doc["choices"])}
    assert frequent["metrics"]["acc"]["value"] == share(lambda text: math.prod(known[c] for c in text))


def test_a_model_at_chance_where_it_has_to_be_above_is_said(points, llama, monkeypatch):
    monkeypatch.setattr(points, "PRETRAINED", (points.Asked("dsv3_ccpm", beats_chance=True),))
    with pytest.raises(SystemExit, match="dsv3_ccpm: is not 3 standard errors above chance"):
        points.main(["--pretrained", str(llama), "--parts", "pretrained", *FEW])


def test_answers_that_differ_are_said(points, run, monkeypatch):
    monkeypatch.setattr(points, "SAMPLE", points.SAMPLE[:1])
    export = points.export

    def another(checkpoint, folder):
        export(checkpoint, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.lm_head.weight.data.mul_(1.1)
        model.save_pretrained(folder)

    monkeypatch.setattr(points, "export", another)
    with pytest.raises(SystemExit, match="dsv3_ccpm: the answers of dsv3 and hf on equal weights differ"):
        points.main(["--checkpoint", str(run), "--parts", "same_weights", *FEW])


def test_a_wrong_number_of_bytes_is_said(points, llama, monkeypatch):
    of_tokens = points.token_bytes
    monkeypatch.setattr(points, "token_bytes", lambda tokenizer: of_tokens(tokenizer) + 1)
    with pytest.raises(SystemExit, match="by task, by hand and by metric differ"):
        points.main(["--pretrained", str(llama), "--parts", "pretrained_texts", *FEW])


def test_a_checkpoint_that_is_missing_is_one_error(points, capsys):
    with pytest.raises(SystemExit):
        points.main(["--parts", "trained"])
    assert "--checkpoint: is missing" in capsys.readouterr().err


@pytest.mark.network
@pytest.mark.slow
def test_the_pretrained_model_knows_english(monkeypatch, tmp_path):
    """The real one: as in the committed result, and above chance where data are at hand."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delenv("LIGHTNING_DSV3_CACHE", raising=False)
    import reference_points

    names = ["pretrained_texts"]
    if os.environ.get("LIGHTNING_DSV3_DATA"):
        names.append("pretrained")
        asked = [one for one in reference_points.PRETRAINED if one.beats_chance]
        monkeypatch.setattr(reference_points, "PRETRAINED", asked)
    path = tmp_path / "points.json"
    reference_points.main(["--parts", *names, "--output", str(path)])
    now, before = (
        {row["text"]: row["plain"] for row in json.loads(file.read_text())["parts"]["pretrained_texts"]["rows"]}
        for file in (path, ROOT / "benchmarks" / "results" / "reference_points.json")
    )
    # Those from pinned wheels; the others are as this Python and this sympy have them.
    for name in ("Hamlet, beginning", "三国演义, beginning", "idioms, beginning"):
        assert now[name] == pytest.approx(before[name], abs=1e-3)
    assert now["asyncio/queues.py, beginning"] < 1
