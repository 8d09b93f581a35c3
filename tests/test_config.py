"""Configuration: presets and their parameter counts, the grammar, and one clear error for everything impossible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.config import (
    BatchRamp,
    ConfigError,
    DeepSeekV3Config,
    RunConfig,
    load_run_config,
    preset_names,
)
from lightning_dsv3.model import DeepSeekV3

# Published sizes and the counts computed from the published shapes (report, section 4.2; arXiv 2405.04434).
PUBLISHED = {
    "671b": (671_026_419_200, 11_610_068_224, 37_552_297_472, 36_625_618_432),
    "236b_v2": (235_741_434_880, 0, 21_375_800_320, 20_851_512_320),
    "16b_v2": (15_706_484_224, 0, 2_661_150_208, 2_451_435_008),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_parameter_counts(name: str) -> None:
    assert tuple(DeepSeekV3Config.from_preset(name).num_parameters()) == PUBLISHED[name]


def test_every_preset_of_the_design_is_there() -> None:
    assert preset_names("model") == ["16b", "16b_v2", "1b", "236b", "236b_v2", "3b", "671b", "tiny"]


@pytest.mark.parametrize(("name", "billions"), [("1b", 1), ("3b", 3), ("16b", 15.7), ("236b", 235.7)])
def test_presets_are_as_large_as_their_names(name: str, billions: float) -> None:
    assert DeepSeekV3Config.from_preset(name).num_parameters().total / 1e9 == pytest.approx(billions, rel=0.11)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": None, "num_nextn_predict_layers": 2},
        {"n_shared_experts": 0, "topk_method": "greedy", "scoring_func": "softmax"},
        {"tie_word_embeddings": True, "first_k_dense_replace": 0},
    ],
)
def test_parameter_count_equals_the_built_model(overrides: dict) -> None:
    config = DeepSeekV3Config.from_preset("tiny", **overrides)
    model = DeepSeekV3(config)
    mtp = sum(t.numel() for t in model.mtp.state_dict().values())
    unique = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    counts = config.num_parameters()
    assert counts.mtp == mtp
    assert counts.total == sum(unique.values()) - mtp
    idle = (
        (config.n_routed_experts - config.num_experts_per_tok) * 3 * config.hidden_size * config.moe_intermediate_size
    )
    assert counts.activated == counts.total - config.num_moe_layers * idle


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"n_group": 5}, ["model.n_group=5", "n_routed_experts=32", "use n_group=4"]),
        ({"topk_group": 8}, ["model.topk_group=8", "at most 4"]),
        ({"num_experts_per_tok": 17}, ["model.topk_group=2", "num_experts_per_tok=17", "use topk_group=3"]),
        ({"topk_method": "greedy", "num_experts_per_tok": 40}, ["num_experts_per_tok=40", "n_routed_experts=32"]),
        ({"qk_rope_head_dim": 15}, ["model.qk_rope_head_dim=15", "even"]),
        ({"first_k_dense_replace": 9}, ["model.first_k_dense_replace=9", "num_hidden_layers=4"]),
        ({"scoring_func": "sigmoi"}, ["model.scoring_func='sigmoi'", "did you mean 'sigmoid'"]),
        ({"hidden_size": 0}, ["model.hidden_size=0", "1 or more"]),
        ({"hidden_size": 192.5}, ["model.hidden_size=192.5", "whole number"]),
        ({"rms_norm_eps": float("nan")}, ["model.rms_norm_eps=nan", "positive"]),
        ({"group_score": "topk_over_m", "num_experts_per_tok": 3}, ["group_score", "top2"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling.type='linear'", "yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, ["original_max_position_embeddings", "missing"]),
    ],
)  # fmt: skip
def test_impossible_model_is_one_error_that_names_key_value_and_fix(overrides: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        DeepSeekV3Config.from_preset("tiny", **overrides)
    for word in words:
        assert word in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        DeepSeekV3Config.from_preset("tiny", hidden_size=-1, vocab_size=0, topk_method="best")
    assert str(caught.value).count("model.") == 3


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.hiden_size=1", ["model.hiden_size=1", "did you mean 'hidden_size'"]),
        ("sed=1", ["sed=1", "did you mean 'seed'"]),
        ("model=tinny", ["model='tinny'", "did you mean 'tiny'"]),
        ("model.hidden_size=big", ["model.hidden_size", "'big'"]),
        ("train.batch_size=0", ["train.batch_size=0"]),
        ("train.schedule.learning_rate=[{until: 5, value: 1}, {until: 4, value: 1}]", ["learning_rate", "rise"]),
        ("train.schedule.learning_rate=[{until: 5, value: 1, shape: bent}]", ["bent", "cosine"]),
        ("train.compile=block", ["train.compile='block'", "blocks"]),
        ("train.activation_checkpointing=all", ["activation_checkpointing='all'", "keep_routing"]),
        ("train.schedule.batch_ramp={start: 0, until: 9, increment: 1}", ["batch_ramp.start=0", "1 or more"]),
        ("train.schedule.batch_ramp={start: 1, until: 9, increment: 0}", ["batch_ramp.increment=0", "1 or more"]),
        ("train.schedule.batch_ramp={start: 1, until: 0, increment: 1}", ["batch_ramp.until=0.0", "batch_ramp=null"]),
        ("train.schedule.batch_ramp={start: 9, until: 9, increment: 1}", ["batch_ramp.start=9", "train.batch_size=8"]),
        ("train.schedule.batch_ramp={strat: 1}", ["batch_ramp.strat", "did you mean 'start'"]),
        ("train.schedule.batch_ramp.start=2", ["train.schedule.batch_ramp.until", "not given"]),
        ("train.schedule.batch_ramp=3", ["train.schedule.batch_ramp=3", "int"]),
        ("balance=[aux_fre]", ["aux_fre", "did you mean 'aux_free'"]),
        ("kernels.rooter=torch", ["kernels.rooter=torch", "did you mean 'router'"]),
        ("kernels.router=tritn", ["kernels.router='tritn'", "did you mean 'triton'"]),
        ("kernels.router=chunked", ["kernels.router='chunked'", "auto, torch, triton"]),
        ("kernels.router=null", ["kernels.router=null", "str"]),
        ("kernels=torch", ["kernels=torch", "KernelConfig"]),
        ("balance_args.sequence.alpha=-1", ["alpha=-1"]),
        ("data.weights={english: -1}", ["data.weights"]),
        ("train.sequence_length=4096", ["train.sequence_length=4096", "max_position_embeddings"]),
        ("model=nowhere.yaml", ["nowhere.yaml", "cannot be read"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("model.topk_method=greedy", ["aux_free", "topk_method"]),
    ],
)
def test_bad_word_is_one_clear_error(word: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([word])
    for part in expected:
        assert part in str(caught.value)


def test_words_may_come_in_any_order_and_win_over_files_and_presets(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("hidden_size: 96\nmoe_intermediate_size: 32\n")
    run = tmp_path / "run.yaml"
    run.write_text("seed: 5\ntrain: {batch_size: 4}\n")
    words = [
        "model.hidden_size=64",
        f"config={run}",
        "seed=6",
        f"model={own}",
        "trainer.max_steps=3",
        "study=no_aux_free",
    ]
    for order in (words, words[::-1]):
        config = load_run_config(order)
        assert (config.model.hidden_size, config.model.moe_intermediate_size) == (64, 32)
        assert (config.seed, config.train.batch_size) == (6, 4)
        assert (config.trainer, config.balance) == ({"max_steps": 3}, ["sequence"])
        assert config.name == "own"


def test_yaml_of_a_run_reads_back_equal(tmp_path: Path) -> None:
    config = load_run_config(["model.q_lora_rank=null", "balance=[aux_free,batch]", "trainer.devices=2"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_run_config([f"config={file}"]) == config


def test_resume_takes_the_runs_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_run_config(["seed=9", "model.hidden_size=64"]).to_yaml())
    config = load_run_config([f"resume={tmp_path}", "train.total_tokens=77"])
    assert (config.seed, config.model.hidden_size, config.train.total_tokens) == (9, 64, 77)
    assert config.resume == str(tmp_path)


def test_reports_schedule_has_its_marks_and_scales_to_a_short_run() -> None:
    train = load_run_config(["train=report", "model.max_position_embeddings=4096"]).train
    rate, weight, gamma = (train.scheduled(n) for n in ("learning_rate", "mtp_loss_weight", "bias_update_rate"))
    assert (rate(5e12), rate(14.5e12), rate(14.8e12)) == (2.2e-4, 2.2e-5, 7.3e-6)
    assert rate(12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half-way down the cosine
    assert (weight(1e13), weight(1.1e13), gamma(1.43e13), gamma(1.44e13)) == (0.3, 0.1, 0.001, 0.0)
    short = load_run_config(["train=report", "model.max_position_embeddings=4096", "train.total_tokens=14800000"]).train
    assert short.scheduled("mtp_loss_weight")(10_000_001) == 0.1
    assert short.scheduled("learning_rate")(14_800_000) == 7.3e-6


def test_a_batch_ramp_is_set_changed_and_taken_away(tmp_path: Path) -> None:
    word = "train.schedule.batch_ramp={start: 2, until: 7.4e+12, increment: 3}"
    ramp = load_run_config([word]).train.schedule.batch_ramp
    assert ramp == BatchRamp(start=2, until=7.4e12, increment=3)
    changed = load_run_config([word, "train.schedule.batch_ramp.start=4", "train.total_tokens=2000"])
    assert changed.train.schedule.batch_ramp == BatchRamp(start=4, until=7.4e12, increment=3)
    assert changed.train.batch_sizes.ramp.until == pytest.approx(1000)
    (tmp_path / "config.yaml").write_text(changed.to_yaml())
    assert load_run_config([f"resume={tmp_path}"]).train == changed.train
    for words in ([word], ["train=report", "model=671b"], [f"resume={tmp_path}"]):
        assert load_run_config([*words, "train.schedule.batch_ramp=null"]).train.schedule.batch_ramp is None
    assert load_run_config().train.schedule.batch_ramp is None


@given(st.integers(1, 10**9), st.integers(1, 512), st.integers(1, 64))
def test_steps_cover_the_tokens_asked_for_and_no_more_than_one_step_beyond(total: int, length: int, batch: int) -> None:
    import dataclasses

    train = dataclasses.replace(RunConfig().train, total_tokens=total, sequence_length=length, batch_size=batch)
    assert 0 <= train.max_steps * batch * length - total < batch * length


def test_hugging_face_configuration_round_trips_for_every_preset() -> None:
    for name in preset_names("model"):
        config = DeepSeekV3Config.from_preset(name)
        assert DeepSeekV3Config.from_hf(config.to_hf()) == config


def test_both_spellings_of_rope_are_read() -> None:
    values = DeepSeekV3Config.from_preset("671b").to_hf()
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    old = values | {"rope_scaling": {"type": "yarn"} | yarn}
    new = {k: v for k, v in values.items() if not k.startswith("rope_")}
    new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0} | yarn
    assert DeepSeekV3Config.from_hf(old) == DeepSeekV3Config.from_hf(new)
    assert DeepSeekV3Config.from_hf(old).rope_scaling == {"type": "yarn"} | yarn


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "deepseek_v32"}, "V3.2"),
        ({"index_topk": 2048}, "V3.2"),
        ({"model_type": "deepseek_v4"}, "V4"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ],
)
def test_architectures_that_only_look_alike_are_refused(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        DeepSeekV3Config.from_hf(DeepSeekV3Config.from_preset("671b").to_hf() | change)


def test_configuration_imports_no_torch() -> None:
    code = "import sys, lightning_dsv3.config as c; c.load_run_config([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
