"""Small Hugging Face models under a Lightning Trainer, with a count of their own of what the experts were given."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from tiny_moe import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

RATE = 0.01
VOCABULARY = 32
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.5,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3",
        MLA | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "glm4_moe": ("Glm4Moe", {"n_routed_experts": 8, "first_k_dense_replace": 1, "head_dim": 8}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0}),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 8, "head_dim": 8}),
    "lfm2_moe": ("Lfm2Moe", {"num_experts": 8, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2}),
    "longcat_flash": (
        "LongcatFlash",
        MLA
        | {"n_routed_experts": 8, "zero_expert_num": 3, "moe_topk": 2, "num_layers": 1, "head_dim": 4}
        | {"ffn_hidden_size": 8, "expert_ffn_hidden_size": 8},
    ),
    "afmoe": ("Afmoe", {"num_experts": 8, "num_dense_layers": 0, "head_dim": 8}),
    "laguna": ("Laguna", {"num_experts": 8, "head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "head_dim": 8, "decoder_sparse_step": 1}),
    "olmoe": ("Olmoe", {"num_experts": 8}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "head_dim": 8}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 8}),
    "deepseek_v2": (
        "DeepseekV2",
        MLA
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
        | {"first_k_dense_replace": 0},
    ),
}
WITH_BIAS = [*MODELS][:8]
WITHOUT_BIAS = [*MODELS][8:]


def build_model(family: str) -> nn.Module:
    name, settings = MODELS[family]
    config = getattr(transformers, f"{name}Config")(**COMMON | settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


class LanguageModel(pl.LightningModule):
    """Any causal model. `given[layer][expert]` counts the tokens that each layer's experts were called with."""

    def __init__(self, model: nn.Module, lr: float = 0.01) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.given: dict[str, list[int]] = {}
        self._handles = [
            module.register_forward_pre_hook(self._recorder(path))
            for path, module in model.named_modules()
            if path.rpartition(".")[2] == "experts"
        ]

    def _recorder(self, path: str) -> Any:
        def record(module: nn.Module, args: Any) -> None:
            if self.training:
                [ids] = [arg for arg in args if arg.dtype == torch.int64]
                counts = self.given.setdefault(path, [0] * 11)
                for expert in ids.flatten().tolist():
                    counts[expert] += 1

        return record

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(input_ids=batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def tokens(num_rows: int = 6, length: int = 9, rank: int = 0, num_ranks: int = 1) -> DataLoader:
    rows = torch.randint(0, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(1))
    return DataLoader(rows[rank::num_ranks], batch_size=2)


def fit(module: LanguageModel, *callbacks: Any, ckpt_path: Any = None, rows: int = 6, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(*callbacks, use_distributed_sampler=False, **arguments)
    loader = tokens(rows, rank=trainer.global_rank, num_ranks=trainer.world_size)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def moved(bias: list[float], load: list[int], rate: float = RATE) -> list[float]:
    """Return the bias after one step of the report's rule, computed on lists."""
    mean = sum(load) / len(load)
    sign = torch.tensor([(mean > n) - (mean < n) for n in load], dtype=torch.float32)
    return (torch.tensor(bias) + rate * sign).tolist()
