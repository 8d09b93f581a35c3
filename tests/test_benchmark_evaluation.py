"""The evaluation benchmark on a few made-up questions: its figures hang together, and a wrong answer stops it."""

import argparse
import json
import math
import sys

import choice_records
import datasets
import generation_records
import pytest
import torch
from conftest import ROOT

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark, on records of ours."""
    splits = {**choice_records.hub(), **generation_records.hub()}

    def load(path, name=None, *, split="test", data_files=None, **_):
        return splits[data_files[split][0] if data_files else path, name, split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.delenv("LIGHTNING_DSV3_DATA", raising=False)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import evaluation

    monkeypatch.setattr(evaluation, "PASS", (1, 16))
    yield evaluation
    for name in ("evaluation", "evaluation_requests"):
        sys.modules.pop(name, None)


FEW = [
    "--subjects", "1", "--questions", "3", "--documents", "4", "--prompts", "2", "--texts", "2", "--new-tokens", "4",
    "--rounds", "1", "--batches", "1", "2", "--threads", "1",
]  # fmt: skip


def test_figures_hang_together(benchmark, tmp_path, capsys):
    benchmark.main(["--benchmarks", "cmmlu", "c3", "gsm8k", "bpb", *FEW, "--output", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["benchmark"] for row in rows] == ["cmmlu", "c3", "gsm8k", "bpb"]
    for row in rows:
        # A prompt that ends within another, or before the rest of its batch, has its last token read twice.
        assert row["tokens_unique"] <= row["tokens_computed"] <= 1.05 * row["tokens_unique"]
        assert row["ratio"] == pytest.approx(row["hf_seconds"] / row["seconds"])
        assert 0 < row["reached"] == pytest.approx(row["ratio"] / row["bound"])
        assert row["hf_settings"]["attention"] == "sdpa"
    letters, options, text, documents = rows
    assert [row["requests"] for row in rows[:3]] == ["dsv3_cmmlu", "dsv3_c3", "dsv3_gsm8k"]
    assert letters["number_of_requests"] % 4 == 0
    for row in (letters, options, text):
        assert row["tokens_computed"] < row["tokens_asked"]
    assert documents["tokens_computed"] >= 0.9 * documents["tokens_asked"]
    # Letters to choose from cost hf one pass a question; the prompt of other options it reads for each of them.
    assert letters["hf_tokens_computed"] < letters["tokens_asked"] / 2
    assert options["hf_tokens_computed"] > 2 * options["tokens_unique"]
    assert text["equal_texts"] + text["ties"] >= 1
    for row in (letters, options, documents):
        assert row["largest_difference_per_token"] < 1e-4
    assert "gsm8k" in capsys.readouterr().out


def test_bfloat16_counts_flipped_choices(benchmark, tmp_path):
    words = ["--benchmarks", "cmmlu", "--dtype", "bfloat16", *FEW, "--output", str(tmp_path / "result.json")]
    benchmark.main(words)
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert set(row["choices_flipped"]) == {"ours", "hf"}
    assert all(0 <= share <= 1 for share in row["choices_flipped"].values())
    assert "largest_difference_per_token" not in row


@pytest.fixture
def sides(benchmark, tmp_path):
    """The benchmark's arithmetic with our model alone."""
    sides = benchmark.Sides.__new__(benchmark.Sides)
    sides.arguments = argparse.Namespace(new_tokens=4)
    sides.ours = benchmark.DSV3LM(checkpoint=benchmark.export(tmp_path, None), device="cpu")
    return sides


def test_a_wrong_answer_stops_it(benchmark, sides):
    asked = benchmark.Requests("loglikelihood", [Instance("loglikelihood", {}, ("the old", " gate"), 0)], "")
    tokens = len(sides.ours.tok_encode(" gate", add_special_tokens=False))
    found = sides._compare(asked, {"ours": [(-3.0, False)], "hf": [(-3.00005, False)]})
    assert found == {"largest_difference_per_token": pytest.approx(5e-5 / tokens)}
    for wrong in (-3.01, math.nan):
        with pytest.raises(RuntimeError, match="nats a token apart"):
            sides._compare(asked, {"ours": [(-3.0, False)], "hf": [(wrong, False)]})

    asked = benchmark.Requests("generate_until", [Instance("generate_until", {}, ("the old", {}), 0)], "")
    assert sides._compare(asked, {"ours": [" gate"], "hf": [" gate"]}) == {"equal_texts": 1.0, "ties": 0}
    for wrong in (" song", " gate is"):
        with pytest.raises(RuntimeError, match="different text"):
            sides._compare(asked, {"ours": [" gate"], "hf": [wrong]})


def test_the_first_different_token_of_two_texts_decides(benchmark, sides):
    ids = {text: sides.ours.tok_encode(text, add_special_tokens=False) for text in (" gate", " song")}
    with torch.no_grad():
        logits = sides.ours._model(torch.tensor([sides.ours.tok_encode("the old")])).logits[0, -1]
    expected = abs(float(logits[ids[" gate"][0]] - logits[ids[" song"][0]]))
    assert sides._gap_where_they_part("the old", " gate", " song") == pytest.approx(expected, abs=1e-4)
    assert sides._gap_where_they_part("the old", " gate", " gate is") == math.inf
