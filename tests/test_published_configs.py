"""``config.json`` as published, read by ``from_hf``: the shapes give the published parameter counts.

The values are those of the public repositories' files, without keys that say nothing about the mathematics.
"""

from __future__ import annotations

from typing import Any

import pytest

from lightning_dsv3.config import ConfigError, DeepSeekV3Config

COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "seq_aux": True, "tie_word_embeddings": False, "use_cache": True,
    "pretraining_tp": 1, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
}  # fmt: skip
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "topk_method": "noaux_tc", "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
V2 = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
    "hidden_size": 5120, "intermediate_size": 12288, "max_position_embeddings": 163840, "moe_intermediate_size": 1536,
    "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "topk_group": 3,
    "topk_method": "group_limited_greedy", "vocab_size": 102400,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
MOONLIGHT = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0,
    "q_lora_rank": None, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid", "topk_group": 1, "topk_method": "noaux_tc", "vocab_size": 163840,
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1,
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


# Sizes as their authors print them, in billions, and how far from them the number may be.
@pytest.mark.parametrize(
    ("published", "total", "activated"),
    [
        (V3, (671, 0.5), (37, 0.7)),  # printed with the embedding: 37.6, without: 36.6
        (V2, (236, 0.5), (21, 0.5)),
        (V2_LITE, (15.7, 0.05), (2.4, 0.06)),
        (KIMI_K2, (1000, 50), (32, 1)),
    ],
    ids=["V3 and R1", "V2", "V2-Lite", "Kimi-K2"],
)
def test_published_configuration_gives_the_published_size(
    published: dict[str, Any], total: tuple[float, float], activated: tuple[float, float]
) -> None:
    counts = DeepSeekV3Config.from_hf(published).num_parameters()
    assert counts.total / 1e9 == pytest.approx(total[0], abs=total[1])
    assert counts.activated_without_embedding / 1e9 == pytest.approx(activated[0], abs=activated[1])


def test_moonlight_gives_the_size_that_its_card_prints_without_embeddings() -> None:
    config = DeepSeekV3Config.from_hf(MOONLIGHT)
    counts = config.num_parameters()
    embeddings = 2 * config.vocab_size * config.hidden_size
    assert round((counts.total - embeddings) / 1e9, 2) == 15.29
    assert round((counts.activated - embeddings) / 1e9, 2) == 2.24


def test_router_of_each_family_is_its_own() -> None:
    expected = {
        "V3": (V3, ("noaux_tc", "sigmoid", True, 2.5)),
        "V2": (V2, ("group_limited_greedy", "softmax", False, 16.0)),
        "V2-Lite": (V2_LITE, ("greedy", "softmax", False, 1.0)),
        "Moonlight": (MOONLIGHT, ("noaux_tc", "sigmoid", True, 2.446)),
        "Kimi-K2": (KIMI_K2, ("noaux_tc", "sigmoid", True, 2.827)),
    }
    for name, (published, router) in expected.items():
        config = DeepSeekV3Config.from_hf(published)
        read = (config.topk_method, config.scoring_func, config.norm_topk_prob, config.routed_scaling_factor)
        assert read == router, name
    assert DeepSeekV3Config.from_hf(V3).num_nextn_predict_layers == 1
    assert DeepSeekV3Config.from_hf(V2).num_nextn_predict_layers == 0
    assert DeepSeekV3Config.from_hf(MOONLIGHT).rms_norm_eps == 1e-5


@pytest.mark.parametrize("published", [V3, V2, V2_LITE, MOONLIGHT, KIMI_K2])
def test_what_is_written_is_read_back(published: dict[str, Any]) -> None:
    config = DeepSeekV3Config.from_hf(published)
    assert DeepSeekV3Config.from_hf(config.to_hf()) == config


def test_deepseek_v32_is_refused_by_name() -> None:
    indexer = {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
    with pytest.raises(ConfigError, match=r"V3\.2"):
        DeepSeekV3Config.from_hf(V3 | indexer)
