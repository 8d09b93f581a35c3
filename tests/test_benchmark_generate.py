"""The benchmark of generation, at a size where nothing is worth measuring: what it counts, compares and writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference import LatentCache, extend
from lightning_dsv3.layers import mla
from lightning_dsv3.model import DeepSeekV3

pytest.importorskip("transformers", reason="needs the [hf] extra")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import generate as benchmark
import generate_parts as parts
import generate_speculation as speculation

TINY = benchmark.MODEL | {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 10, "num_experts_per_tok": 3, "max_position_embeddings": 256,
    "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "MODEL", TINY)
    monkeypatch.setattr(parts, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(parts, "QUERIES", (1, 3, 40))
    monkeypatch.setattr(parts, "SHORTEST_CONTEXT", 16)
    monkeypatch.setattr(parts, "EXPERTS", (4, 12))
    monkeypatch.setattr(parts, "HEADS", {"tiny": {}})
    yield
    torch.set_num_threads(threads)


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    output = tmp_path / "results" / "generate.json"
    benchmark.main([*words, "--threads", "1", "--repeats", "2", "--output", str(output)])
    return json.loads(output.read_text())


def tiny_model(**values: Any) -> DeepSeekV3:
    torch.manual_seed(0)
    return DeepSeekV3(DeepSeekV3Config(**TINY | values)).eval()


def test_decode_writes_a_row_for_each_context_and_batch_with_what_was_left_out(tmp_path: Path) -> None:
    words = "--part decode --contexts 8 24 --batches 1 4 --new-tokens 6 --prefill-tokens 48 --generate-tokens 32"
    result = run(tmp_path, *words.split(), "--hf-seconds", "0")
    rows = {(row["context"], row["batch"]): row for row in result["decode"]["rows"]}
    assert set(rows) == {(8, 1), (24, 1), (8, 4), (24, 4)}
    assert {key: row["prefill_rows"] for key, row in rows.items()} == {(8, 1): 1, (24, 1): 1, (8, 4): 4, (24, 4): 2}
    for (context, batch), row in rows.items():
        # Without time for Hugging Face it makes its least number of steps, and ours all.
        assert (row["new_tokens"], row["hf_new_tokens"], row["greedy"]["tokens"]) == (6, 4, 4)
        assert row["ours_cache_bytes_used"] == 3 * batch * (context + 6) * (16 + 8) * 4 <= row["ours_cache_bytes"]
        assert row["hf_cache_bytes"] > 0
        assert (row["hf_generate_seconds"] is None) == (batch * context > 32)
        assert 3 <= row["experts_read_per_layer"] <= min(10, 3 * batch)
        bytes_, copied = row["bytes_per_step"], row["copy_bytes_per_second"]
        assert bytes_["cache"] == pytest.approx(3 * batch * (context + 3.5) * 24 * 4)
        assert row["share_of_bound"] == pytest.approx(bytes_["total"] / copied / row["ours_step_seconds"])
        assert row["ours_decode_tokens_per_second"] == pytest.approx(batch / row["ours_step_seconds"])
    assert {"processor", "threads"} == result["machine"].keys()
    assert "--part decode" in result["command"]


def test_bytes_of_a_step_are_those_of_the_activated_parameters() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    chosen_by_one_token = [2 * 3, 2 * 3]
    counted = benchmark.step_bytes(model, chosen_by_one_token, batch=1, context=10)
    routing_bias = 2 * 10  # read, and no parameter
    activated = model.config.num_parameters().activated_without_embedding
    assert counted["weights"] + counted["experts"] == pytest.approx(
        4 * (activated + routing_bias), abs=4 * routing_bias
    )
    assert counted["embedding"] == 4 * 32
    assert counted["total"] == sum(counted[key] for key in ("weights", "experts", "embedding", "cache"))


def test_texts_that_part_where_the_choice_is_clear_are_an_error() -> None:
    model = tiny_model()
    prompt = torch.randint(0, 61, (2, 5))
    text = benchmark.generate(model, prompt, max_new_tokens=6)
    assert speculation.same_text(model, text, text.clone(), 5) == 0
    logits = model(text[:, :8]).logits[1, -1]
    other = text.clone()
    other[1, 8] = logits.topk(2).indices[1]
    with pytest.raises(RuntimeError, match="row 1, token 8"):
        speculation.same_text(model, text, other, 5)


def test_steps_that_choose_otherwise_are_an_error() -> None:
    ours = benchmark.Ours(tiny_model())
    hf = benchmark.HuggingFace(ours.model)
    ids = torch.randint(0, 61, (2, 5))
    for side in (ours, hf):
        side.prefill(ids)
    with torch.no_grad():
        hf.model.lm_head.weight.neg_()
        with pytest.raises(RuntimeError, match="choose otherwise"):
            benchmark.decode_in_turn(ours, hf, ids[:, :1], 4, 60.0)


def test_crossover_times_both_forms_at_every_number_of_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    for form in ("absorbed_attention", "expanded_attention"):
        original = getattr(mla, form)

        def spy(q_BSHW: Tensor, *args: Any, form: str = form, original: Any = original, **kwargs: Any) -> Tensor:
            calls.append((form, q_BSHW.shape[1]))
            return original(q_BSHW, *args, **kwargs)

        monkeypatch.setattr(mla, form, spy)
    (row,) = run(tmp_path, "--part", "crossover", "--contexts", "16")["crossover"]
    # A warm-up and two repeats of each.
    assert {call: calls.count(call) for call in calls} == {
        (form, queries): 3 for form in ("absorbed_attention", "expanded_attention") for queries in (1, 3, 40)
    }
    # (2 * 16 + 8) q <= 1.25 ((12 + 8 + 12) q + 16 (12 + 12)) for any number q of queries.
    assert row["counted"] is None
    assert row["largest_loss"] >= 0


def test_experts_are_compared_with_a_pass_over_all(tmp_path: Path) -> None:
    few, many = run(tmp_path, "--part", "experts")["experts"]
    assert (few["experts"], many["experts"]) == (4, 12)
    assert few["chosen_bytes"] == many["chosen_bytes"] == 3 * 3 * 16 * 32 * 4
    assert many["all_bytes"] == 12 * 3 * 16 * 32 * 4


def test_mtp_modules_are_not_touched_when_dropped_and_seen_when_run(tmp_path: Path) -> None:
    result = run(tmp_path, "--part", "mtp_dropped")["mtp_dropped"]
    model = tiny_model(num_nextn_predict_layers=1)
    main = {name for name, _ in model.named_parameters() if not name.startswith("mtp.")}
    assert result["touched_tensors"] == len(main)
    assert result["touched_parameters"]["with"] == result["parameters"]["without"] < result["parameters"]["with"]
    with torch.no_grad(), parts.TouchedParameters(model) as seen:
        model(torch.randint(0, 61, (1, 6)), use_mtp=True)
    assert seen.names == {name for name, _ in model.named_parameters()}


def test_a_step_touches_no_parameter_of_a_module_that_it_does_not_run() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    with parts.TouchedParameters(model) as seen:
        extend(model, LatentCache(model.config, 1), torch.tensor([[3]]))
    assert not any(name.startswith(("head.", "mtp.")) for name in seen.names)


def test_speculation_compares_texts_and_counts_what_was_accepted() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    prompts = torch.randint(0, 61, (2, 6))
    with torch.no_grad():
        rows = speculation.speculate(model, [("a", prompts[:1]), ("b", prompts[1:])], new_tokens=12, repeats=1)
    assert [(row["batch"], row["drafts"], len(row["acceptance"])) for row in rows] == [(1, k, k) for k in (1, 2, 3)]
    for row in rows:
        assert row["acceptance_by_domain"].keys() == {"a", "b"}
        assert 1 <= row["tokens_per_pass"] <= row["drafts"] + 1
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["plain_tokens_per_second"])
        assert row["verify_cost"] > 0 < row["draft_cost"]


def test_break_even_is_where_tokens_of_a_round_equal_its_cost() -> None:
    assert speculation.break_even(1.3, 0.1, 1) == pytest.approx(0.4)
    assert speculation.break_even(1.9, 0.2, 1) is None
    # 1 + a + a^2 = 1.75 at a = 0.5.
    assert speculation.break_even(1.5, 0.25, 2) == pytest.approx(0.5, abs=1e-3)
    assert speculation.break_even(3.0, 1.5, 3) is None


@pytest.mark.slow
@pytest.mark.network
def test_speculation_trains_the_default_run_and_takes_held_out_prompts(tmp_path: Path) -> None:
    result = run(tmp_path, "--part", "speculation", "--train-steps", "2", "--new-tokens", "8")["speculation"]
    assert result["prompts"] == {domain: [2, 64] for domain in ("english", "chinese", "code", "math")}
    assert [(row["batch"], row["drafts"]) for row in result["rows"]] == [(b, k) for b in (1, 8) for k in (1, 2, 3)]
