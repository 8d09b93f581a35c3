"""A model of a few thousand parameters whose logits are far from flat, for tests of inference."""

import torch

from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 1024,
}


def tiny_model(seed: int = 0, std: float = 0.15, **overrides) -> DeepSeekV3:
    """Return a model whose matrices have standard deviation ``std``, in evaluation mode."""
    config = DeepSeekV3Config.from_preset("tiny", **(SHAPE | overrides))
    torch.manual_seed(seed)
    model = DeepSeekV3(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    return model
