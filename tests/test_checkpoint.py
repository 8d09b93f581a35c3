"""Folders of safetensors: round trip, shards, and one clear error for everything that cannot be read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_dsv3.checkpoint import CheckpointError, load_hf_checkpoint, save_hf_checkpoint
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
}  # fmt: skip


def model(**overrides: object) -> DeepSeekV3:
    torch.manual_seed(0)
    built = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", **(SMALL | overrides)))
    for name, buffer in built.named_buffers():
        if name.endswith("router.bias"):
            buffer.uniform_(4.9, 5.1)  # where a bfloat16 bias would lose its steps
    return built


@pytest.mark.parametrize(
    "overrides", [{}, {"num_nextn_predict_layers": 2}, {"tie_word_embeddings": True}, {"n_shared_experts": 0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [5_000_000_000, 3000])
def test_round_trip_is_bitwise(overrides: dict, dtype: torch.dtype, shard: int, tmp_path: Path) -> None:
    before = model(**overrides).to(dtype)
    save_hf_checkpoint(before, tmp_path, max_shard_bytes=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == 3000)
    after = load_hf_checkpoint(tmp_path)
    assert after.config == before.config
    mine, theirs = before.state_dict(), after.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name
    assert (after.head.weight is after.embedding.weight) == before.config.tie_word_embeddings


def test_names_shapes_and_types_are_the_released_ones(tmp_path: Path) -> None:
    save_hf_checkpoint(model(), tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {
        "model.embed_tokens.weight": [40, 16],
        "model.layers.0.mlp.gate_proj.weight": [24, 16],
        "model.layers.1.mlp.gate.weight": [4, 16],
        "model.layers.1.mlp.gate.e_score_correction_bias": [4],
        "model.layers.1.mlp.experts.3.up_proj.weight": [8, 16],
        "model.layers.1.mlp.experts.0.down_proj.weight": [16, 8],
        "model.layers.1.mlp.shared_experts.down_proj.weight": [16, 8],
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": [12, 16],
        "model.layers.1.self_attn.kv_b_proj.weight": [16, 8],
        "model.layers.2.embed_tokens.weight": [40, 16],
        "model.layers.2.eh_proj.weight": [16, 32],
        "model.layers.2.shared_head.norm.weight": [16],
        "model.layers.2.shared_head.head.weight": [40, 16],
        "model.layers.2.mlp.gate.e_score_correction_bias": [4],
        "lm_head.weight": [40, 16],
    }
    for name, shape in expected.items():
        assert list(tensors[name].shape) == shape, name
        assert tensors[name].dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
    # Main model: 3 + per layer 9 attention and norm tensors; dense 3; experts 2 + 4 * 3 + 3. MTP layer: 9 + 17 + 6.
    assert len(tensors) == 3 + 2 * 9 + 3 + 17 + (9 + 17 + 6)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_folder_without_mtp_tensors_gives_a_model_without_mtp(tmp_path: Path) -> None:
    save_hf_checkpoint(model(), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("model.layers.2.")}, file)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    loaded = load_hf_checkpoint(tmp_path)
    assert loaded.config.num_nextn_predict_layers == 0
    assert len(loaded.mtp) == 0


def test_bias_stored_in_bfloat16_is_loaded_in_float32(tmp_path: Path) -> None:
    save_hf_checkpoint(model(), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    loaded = load_hf_checkpoint(tmp_path)
    assert loaded.blocks[1].feed_forward.router.bias.dtype == torch.float32
    assert loaded.head.weight.dtype == torch.bfloat16


def test_dtype_of_the_weights_can_be_chosen(tmp_path: Path) -> None:
    save_hf_checkpoint(model().bfloat16(), tmp_path)
    assert load_hf_checkpoint(tmp_path, dtype=torch.float32).head.weight.dtype == torch.float32


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "[16]", "missing"]),
        (lambda t: t.update(odd=torch.zeros(1)), ["odd", "not a tensor of this configuration"]),
        (lambda t: t.update({"lm_head.weight": torch.zeros(40, 15)}), ["lm_head.weight", "[40, 15]", "[40, 16]"]),
        # One part of a stack of experts, and one half of a fused projection.
        (
            lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(7, 16)}),
            ["experts.3.up_proj.weight", "[7, 16]", "[8, 16]"],
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.2.down_proj.weight": torch.zeros(16, 8).double()}),
            ["experts.0.down_proj.weight", "float32, torch.float64"],
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate_proj.weight": torch.zeros(24, 16, dtype=torch.int8)}),
            ["model.layers.0.mlp.gate_proj.weight", "int8", "convert"],
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.weight_scale_inv": torch.zeros(1)}),
            ["weight_scale_inv", "FP8"],
        ),
    ],
)
def test_wrong_tensor_is_named(change, words: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_hf_checkpoint(model(), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load_hf_checkpoint(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_absent_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf_checkpoint(tmp_path)
    save_hf_checkpoint(model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_hf_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="0 safetensors files"):
        load_hf_checkpoint(tmp_path)


FIRST_SHARD = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("weight_map"), ["index.json", "weight_map"]),
        (lambda index: index["weight_map"].update({"model.norm.weight": "gone.safetensors"}), ["gone.safetensors"]),
        (
            lambda index: index["weight_map"].update({"model.norm.weight": FIRST_SHARD}),
            [FIRST_SHARD, "model.norm.weight is not in it"],
        ),
    ],
    ids=["no_map", "no_file", "other_file"],
)
def test_an_index_that_does_not_fit_its_files_is_named(change, words: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_hf_checkpoint(model(), tmp_path, max_shard_bytes=15_000)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    assert index["weight_map"]["model.norm.weight"] != FIRST_SHARD
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        load_hf_checkpoint(tmp_path)
    for word in words:
        assert word in str(caught.value)


@st.composite
def small_configs(draw: st.DrawFn) -> DeepSeekV3Config:
    """Configurations of every kind that the Hugging Face layout can say."""
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    v3 = draw(st.booleans())
    return DeepSeekV3Config(
        vocab_size=draw(st.integers(5, 40)),
        hidden_size=4 * draw(st.integers(1, 5)),
        intermediate_size=draw(st.integers(1, 20)),
        moe_intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_attention_heads=draw(st.integers(1, 3)),
        q_lora_rank=draw(st.none() | st.integers(1, 9)),
        kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 6)),
        qk_rope_head_dim=2 * draw(st.integers(1, 3)),
        v_head_dim=draw(st.integers(1, 9)),
        n_routed_experts=groups * size,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        n_group=groups if v3 else 1,
        topk_group=kept if v3 else 1,
        topk_method="noaux_tc" if v3 else "greedy",
        scoring_func="sigmoid" if v3 else "softmax",
        norm_topk_prob=draw(st.booleans()) if v3 else False,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 16.0])),
        num_nextn_predict_layers=draw(st.integers(0, 2)) if v3 else 0,
        rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(small_configs(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(200, 20_000))
def test_any_configuration_comes_back_bit_for_bit(config: DeepSeekV3Config, dtype: torch.dtype, shard: int) -> None:
    torch.manual_seed(0)
    before = DeepSeekV3(config)
    for name, buffer in before.named_buffers():
        if name.endswith("router.bias"):
            buffer.uniform_(4.9, 5.1)
    before = before.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_hf_checkpoint(before, folder, max_shard_bytes=shard)
        after = load_hf_checkpoint(folder)
    # What a folder cannot say: how MTP states are handed on, and the model's initial values.
    assert after.config.to_hf() == before.config.to_hf()
    mine, theirs = before.state_dict(), after.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert (after.head.weight is after.embedding.weight) == config.tie_word_embeddings


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_hf_checkpoint(model(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="another folder"):
        save_hf_checkpoint(model(hidden_size=24), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
