"""Logits, loss, every gradient and the chosen experts against Hugging Face's DeepSeek-V3 and V2."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lightning_dsv3.checkpoint import load_hf_checkpoint, save_hf_checkpoint
from lightning_dsv3.checkpoint.layout import layout
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

transformers = pytest.importorskip("transformers", reason="needs the [hf] extra")

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
V3 = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 640,
    "initializer_range": 0.2,
}
V2 = V3 | {
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
CASES = {
    "v3": V3,
    "v3_full_query": V3 | {"q_lora_rank": None},
    "v3_one_group": V3 | {"n_group": 1, "topk_group": 1},
    "v3_yarn": V3 | {"rope_scaling": YARN},
    "v3_yarn_plain_factor": V3
    | {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 160}},
    "v3_wide_values": V3 | {"v_head_dim": 32, "moe_intermediate_size": 17},
    "v3_unnormalised": V3 | {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "v3_tied": V3 | {"tie_word_embeddings": True},
    "v3_no_dense_layer": V3 | {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "v3_all_experts_chosen": V3 | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "v2_groups": V2,
    "v2_lite_greedy": V2
    | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0},
    "v2_yarn": V2 | {"rope_scaling": YARN},
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=1e-12))


def their_model(config: DeepSeekV3Config) -> torch.nn.Module:
    values = config.to_hf()
    name = values["architectures"][0]
    config_class = transformers.DeepseekV3Config if "V3" in name else transformers.DeepseekV2Config
    model = getattr(transformers, name)(
        config_class(**values, attn_implementation="eager", experts_implementation="eager")
    ).float()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)  # a norm of ones would hide a missing factor
    return model


def pair(config: DeepSeekV3Config, folder: Path) -> tuple[DeepSeekV3, torch.nn.Module]:
    theirs = their_model(config)
    theirs.save_pretrained(folder)
    return load_hf_checkpoint(folder), theirs


def gradients_in_our_names(theirs: torch.nn.Module, config: DeepSeekV3Config, folder: Path) -> dict[str, torch.Tensor]:
    """Their gradients, taken through their own writer and our reader: one file of gradients in the place of weights."""
    holder = copy.deepcopy(theirs)
    with torch.no_grad():
        for mine, source in zip(holder.parameters(), theirs.parameters(), strict=True):
            assert source.grad is not None
            mine.copy_(source.grad)
    holder.save_pretrained(folder)
    return dict(load_hf_checkpoint(folder).named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_gradients_and_experts_equal_hugging_face(case: str, tmp_path: Path) -> None:
    torch.manual_seed(len(case))
    config = DeepSeekV3Config(**CASES[case])
    ours, theirs = pair(config, tmp_path / "weights")
    assert ours.config == config
    ids = torch.randint(0, config.vocab_size, (3, 21))
    labels = ids.clone()
    labels[0, 5:9] = -100

    chosen: list[torch.Tensor] = []
    for name, module in theirs.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
    expected = theirs(input_ids=ids, labels=labels, use_cache=False)
    expected.loss.backward()
    output = ours(ids, labels=labels)
    assert output.loss is not None
    assert output.logits is not None
    output.loss.backward()

    assert relative_error(output.logits, expected.logits) < 1e-5
    assert abs(float(output.loss) / float(expected.loss) - 1) < 1e-5
    assert len(output.routing) == len(chosen) == config.num_moe_layers
    for routing, theirs_TK in zip(output.routing, chosen, strict=True):
        assert torch.equal(routing.expert_TK.sort(-1).values, theirs_TK.view(routing.expert_TK.shape).sort(-1).values)
    expected_gradients = gradients_in_our_names(theirs, config, tmp_path / "gradients")
    ours_named = dict(ours.named_parameters())
    assert ours_named.keys() == expected_gradients.keys()
    for name, parameter in ours_named.items():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("case", ["v3", "v3_tied", "v2_groups"])
def test_saved_checkpoint_loads_in_hugging_face_with_the_same_logits(case: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = DeepSeekV3Config(**CASES[case])
    ours = DeepSeekV3(config)
    for module in ours.modules():
        if hasattr(module, "num_experts_per_tok") and module.bias is not None:
            module.bias.uniform_(-0.2, 0.2)
    save_hf_checkpoint(ours, tmp_path / "out")
    name = config.to_hf()["architectures"][0]
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, config.vocab_size, (2, 17))
    with torch.no_grad():
        assert relative_error(ours(ids).logits, theirs(input_ids=ids).logits) < 1e-5


def test_mtp_logits_equal_hugging_faces_mtp_module(tmp_path: Path) -> None:
    """HF's MTP reads the state after the final norm, and hands on the state after the module's norm: our defaults."""
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(3)
    config = DeepSeekV3Config(**V3 | {"num_nextn_predict_layers": 2})
    ours = DeepSeekV3(config)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_hf_checkpoint(ours, tmp_path)
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    mtp = MtpModel(main, num_mtp_layers=2).float()
    with torch.no_grad():
        their_layout = {part: entry for entry in layout(config) for row in entry.parts for part in row}
        assert any(name.startswith("model.layers.3.") for name in their_layout)
        for depth, layer in enumerate(mtp.layers):
            mine = ours.mtp[depth]
            layer.enorm.weight.copy_(mine.embedding_norm.weight)
            layer.hnorm.weight.copy_(mine.hidden_norm.weight)
            layer.eh_proj.weight.copy_(mine.projection.weight)
            layer.post_norm.weight.copy_(mine.norm.weight)
            _copy_block(mine.block, layer.mtp_block)
        ids = torch.randint(0, config.vocab_size, (2, 15))
        hidden = main.model(input_ids=ids).last_hidden_state
        output = ours(ids, use_mtp=True)
        for depth, layer in enumerate(mtp.layers, start=1):
            length = ids.shape[1] - depth
            positions = torch.arange(length)[None]
            embedding = main.model.embed_tokens(ids[:, depth:])
            rope = main.model.rotary_emb(embedding, positions)
            causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
            hidden = layer(embedding, hidden[:, :length], rope, causal, positions, None)
            assert output.mtp_logits[depth - 1].shape == (2, length, config.vocab_size)
            assert relative_error(output.mtp_logits[depth - 1], main.lm_head(hidden)) < 1e-5


def _copy_block(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    attention, feed_forward = mine.attention, mine.feed_forward
    pairs = {
        theirs.input_layernorm.weight: mine.attention_norm.weight,
        theirs.post_attention_layernorm.weight: mine.feed_forward_norm.weight,
        theirs.self_attn.q_a_proj.weight: attention.q.down.weight,
        theirs.self_attn.q_a_layernorm.weight: attention.q.norm.weight,
        theirs.self_attn.q_b_proj.weight: attention.q.up.weight,
        theirs.self_attn.kv_a_proj_with_mqa.weight: attention.kv_down.weight,
        theirs.self_attn.kv_a_layernorm.weight: attention.kv_norm.weight,
        theirs.self_attn.kv_b_proj.weight: attention.kv_up.weight,
        theirs.self_attn.o_proj.weight: attention.output.weight,
        theirs.mlp.gate.weight: feed_forward.router.weight,
        theirs.mlp.gate.e_score_correction_bias: feed_forward.router.bias,
        theirs.mlp.experts.gate_up_proj: feed_forward.experts.gate_up,
        theirs.mlp.experts.down_proj: feed_forward.experts.down,
        theirs.mlp.shared_experts.down_proj.weight: feed_forward.shared.down.weight,
    }
    for target, source in pairs.items():
        target.copy_(source)
    gate, up = feed_forward.shared.gate_up.weight.chunk(2)
    theirs.mlp.shared_experts.gate_proj.weight.copy_(gate)
    theirs.mlp.shared_experts.up_proj.weight.copy_(up)
