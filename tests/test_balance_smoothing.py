"""benchmarks/balance_smoothing.py: its arithmetic, against loops over tokens and figures worked out by hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config, plots
from lightning_dsv3.plots import plot_balance_smoothing

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "balance_smoothing.py"


@pytest.fixture(scope="module")
def smoothing() -> ModuleType:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("balance_smoothing", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def counts(*rows: list[int]) -> Tensor:
    """One layer: ``[N, 1, E]``."""
    return torch.tensor(rows).unsqueeze(1)


# Two domains that use other halves of four experts; two sequences of 3 tokens each, one expert per token.
PROSE = counts([3, 0, 0, 0], [1, 2, 0, 0])
CODE = counts([0, 0, 3, 0], [0, 0, 1, 2])
DOMAINS = {"prose": PROSE, "code": CODE}


def test_each_sequence_of_a_model_is_counted_for_itself(smoothing: ModuleType) -> None:
    torch.manual_seed(0)
    config = DeepSeekV3Config.from_preset("tiny", vocab_size=64, hidden_size=16, num_hidden_layers=3)
    model = DeepSeekV3(config).eval()
    ids_NS = torch.randint(0, 64, (smoothing.ROWS + 3, 7))
    counts_NLE = smoothing.route(model, ids_NS)
    assert counts_NLE.shape == (smoothing.ROWS + 3, 2, config.n_routed_experts), "the MTP module does not run"
    for ids_S, counts_LE in zip(ids_NS, counts_NLE, strict=True):
        with torch.no_grad():
            routing = model(ids_S.unsqueeze(0)).routing
        for layer, counts_E in zip(routing, counts_LE, strict=True):
            expected = [0] * config.n_routed_experts
            for expert in itertools.chain.from_iterable(layer.expert_TK.tolist()):
                expected[expert] += 1
            assert counts_E.tolist() == expected
    assert not any(module._forward_hooks for module in model.modules()), "the hooks are off again"


def test_sequences_with_padding_are_left_out(smoothing: ModuleType) -> None:
    class Data:
        domains = ("prose", "code")

        def test_dataloader(self) -> list[list[dict[str, Tensor]]]:
            labels = torch.tensor([[1, 2, 3], [4, 5, -100], [-100, 7, 8]])
            batch = {"input_ids": labels.abs(), "labels": labels, "domain": torch.tensor([1, 1, 0])}
            return [[batch], [batch | {"domain": torch.tensor([0, 0, 0])}]]

    # The first label is never predicted; held-out windows begin with text.
    found = smoothing.held_out_sequences(Data())
    assert {domain: ids_NS.tolist() for domain, ids_NS in found.items()} == {
        "prose": [[100, 7, 8], [1, 2, 3], [100, 7, 8]],
        "code": [[1, 2, 3]],
    }


def test_neighbours_add_up_and_the_rest_drops(smoothing: ModuleType) -> None:
    rows = counts([1, 0], [2, 0], [3, 1], [4, 0], [5, 9])
    assert smoothing.added_up(rows, 2).squeeze(1).tolist() == [[3, 0], [7, 1]]
    assert smoothing.added_up(rows, 5).squeeze(1).tolist() == [[15, 10]]


def test_gpus_hold_neighbouring_experts(smoothing: ModuleType) -> None:
    # Two layers, whose busiest experts are 2.5 and 1 times the mean; on two GPUs 12 : 4 and 8 : 8.
    counts_MLE = torch.tensor([[[10, 2, 3, 1], [4, 4, 4, 4]]])
    assert smoothing.violation(counts_MLE, 4).tolist() == [(1.5 + 0) / 2]
    assert smoothing.violation(counts_MLE, 2).tolist() == [(0.5 + 0) / 2]
    assert smoothing.violation(counts_MLE, 1).tolist() == [0]


def test_micro_batches_of_one_domain_and_of_all(smoothing: ModuleType) -> None:
    rows = smoothing.by_tokens(DOMAINS, [3, 6, 12], length=3, chosen=1, shuffles=50, seed=0)
    found = {(row["text"], row["tokens"]): row for row in rows}
    # A domain alone: [3,0,0,0] has MaxVio 3, [1,2,0,0] 5/3; together [4,2,0,0] 5/3. There are no 12 tokens of it.
    assert found["prose", 3]["mean"] == pytest.approx((3 + 5 / 3) / 2)
    assert found["prose", 3]["std"] == pytest.approx((3 - 5 / 3) / 2)
    assert found["prose", 6]["mean"] == pytest.approx(5 / 3)
    assert ("prose", 12) not in found
    assert found["prose", 6]["disjoint"] == 1
    # All twelve tokens of both domains: [4,2,4,2].
    assert found["all domains", 12]["mean"] == pytest.approx(1 / 3)
    # Any two of the four sequences, each pair as likely, add up to one of these.
    pairs = [sum(pair) for pair in itertools.combinations([*PROSE, *CODE], 2)]
    expected = sum(float(pair.max() * 4 / pair.sum() - 1) for pair in pairs) / len(pairs)
    assert found["all domains", 6]["mean"] == pytest.approx(expected, abs=0.1)


def test_ranks_of_one_domain_even_out_when_they_are_pooled(smoothing: ModuleType) -> None:
    rows = smoothing.by_ranks(DOMAINS, [1, 2, 4], together=2, length=3, chosen=1, shuffles=5, seed=0)
    found = {(row["rank_reads"], row["gpus"], row["ranks"]): row for row in rows}
    # A rank is a domain here: [4,2,0,0] or [0,0,4,2]. On two GPUs one has everything; two ranks together are even.
    assert found["one domain", 4, 1]["mean"] == pytest.approx(5 / 3)
    assert found["one domain", 2, 1]["mean"] == pytest.approx(1)
    assert found["one domain", 4, 2]["mean"] == pytest.approx(1 / 3)
    assert found["one domain", 2, 2]["mean"] == pytest.approx(0)
    assert found["one domain", 2, 2]["tokens"] == 12
    # All sequences together are the same, whoever read them.
    assert found["all domains", 4, 2]["mean"] == pytest.approx(1 / 3)
    assert {row["ranks"] for row in rows} == {1, 2}, "four ranks would need more text"


def test_the_floor_is_what_independent_choices_give(smoothing: ModuleType) -> None:
    # Two choices among two experts: 2:0 or 1:1, each half the time. MaxVio is 1 or 0.
    assert smoothing.floor(2, 1, layers=3, experts=2, num_gpus=2, seed=0) == pytest.approx(0.5, abs=0.05)
    # Two experts and many tokens: E|x| of a normal of variance 1/n.
    expected = math.sqrt(2 / (math.pi * 4000))
    assert smoothing.floor(1000, 4, layers=3, experts=2, num_gpus=2, seed=0) == pytest.approx(expected, rel=0.1)
    assert smoothing.floor(64, 2, layers=1, experts=8, num_gpus=2, seed=0) < smoothing.floor(
        64, 2, layers=1, experts=8, num_gpus=8, seed=0
    )


def test_statistics_are_those_of_all_micro_batches(smoothing: ModuleType) -> None:
    found = smoothing.statistics(torch.arange(11))
    assert found == {"mean": 5.0, "std": pytest.approx(math.sqrt(10)), "p10": 1.0, "p90": 9.0}


def test_a_checkpoint_outside_a_run_folder_is_one_error(
    smoothing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["balance_smoothing.py", "--checkpoint", str(tmp_path / "a" / "b.ckpt")])
    with pytest.raises(SystemExit):
        smoothing.main()
    assert "give RUN/checkpoints/x.ckpt" in capsys.readouterr().err


def test_the_figure_draws_every_series(smoothing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, *rest, **kw: (drawn.append(figure), save(figure, *rest, **kw))
    )
    result = {
        "model": {"experts": 4},
        "rank_tokens": 6,
        "micro_batches": smoothing.by_tokens(DOMAINS, [3, 6], length=3, chosen=1, shuffles=2, seed=0),
        "ranks": smoothing.by_ranks(DOMAINS, [1, 2], together=2, length=3, chosen=1, shuffles=2, seed=0),
    }
    plot_balance_smoothing(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    left, right = drawn[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == ["all domains", "prose alone", "code alone", "chance alone"]
    assert list(lines["prose alone"].get_xdata()) == [3, 6]
    assert list(lines["prose alone"].get_ydata()) == pytest.approx([(3 + 5 / 3) / 2, 5 / 3])
    lines = {line.get_label(): line for line in right.lines}
    assert list(lines["2 GPUs, 2 experts each"].get_ydata()) == pytest.approx([2, 1])
    assert list(lines["4 GPUs, 1 expert each"].get_ydata()) == pytest.approx([8 / 3, 4 / 3])


def test_the_page_has_the_measured_figures() -> None:
    root = FILE.parents[1]
    result = json.loads((root / "benchmarks" / "results" / "balance_smoothing.json").read_text())
    page = (root / "docs" / "balance.md").read_text(encoding="utf-8")
    tables = {
        cells[0]: cells[1:]
        for line in page.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
    }
    micro_batches = {(row["text"], row["tokens"]): row for row in result["micro_batches"]}
    ranks = {(row["rank_reads"], row["gpus"], row["ranks"]): row for row in result["ranks"]}
    sizes, pools = (256, 2048, 16384, 65536), (1, 16, 64, 256)
    assert tables["MaxVio of a micro-batch"] == [f"{tokens:,} tokens" for tokens in sizes]
    for text in {text for text, _ in micro_batches}:
        line = text if text == "all domains" else f"{text} alone"
        assert tables[line] == [f"{micro_batches[text, tokens]['mean']:.2f}" for tokens in sizes]
    assert tables["chance alone"] == [f"{micro_batches['all domains', tokens]['floor']:.2f}" for tokens in sizes]
    for gpus in (32, 8, 2):
        values = [f"{1 + ranks['one domain', gpus, pooled]['mean']:.2f}" for pooled in pools]
        assert tables[f"experts on {gpus} GPUs"] == values
    assert tables["on 32 GPUs, ranks of all domains"] == [
        f"{1 + ranks['all domains', 32, pooled]['mean']:.2f}" for pooled in pools
    ]
    assert tables["on 32 GPUs, chance alone"] == [
        f"{1 + ranks['one domain', 32, pooled]['floor']:.2f}" for pooled in pools
    ]
    assert (root / "docs" / "figures" / "balance_smoothing.png").stat().st_size < 120_000
