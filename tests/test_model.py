"""The model beyond Hugging Face parity: MTP's options, dtypes, gradients and what it refuses to drop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.router import Router
from lightning_dsv3.model import DeepSeekV3

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.2,
}  # fmt: skip


def small(**overrides: object) -> DeepSeekV3:
    torch.manual_seed(0)
    return DeepSeekV3(DeepSeekV3Config.from_preset("tiny", **(SMALL | overrides)))


def ids_of(model: DeepSeekV3, batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("normalizer", ["main", "own"])
def test_mtp_losses_are_equation_24(depth: int, normalizer: str) -> None:
    """L^k = -1/T sum log P_i[t_i] over the targets at distance k + 1; T counts the main head's targets."""
    model = small(num_nextn_predict_layers=depth, mtp_loss_normalizer=normalizer)
    ids = ids_of(model)
    labels = ids.clone()
    labels[0, 3:6] = -100
    output = model(ids, labels=labels)
    assert len(output.mtp_losses) == len(output.mtp_logits) == depth
    main_targets = int((labels[:, 1:] != -100).sum())
    for k, (loss, logits) in enumerate(zip(output.mtp_losses, output.mtp_logits, strict=True), start=1):
        targets = labels[:, k + 1 :]
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
        divisor = main_targets if normalizer == "main" else int((targets != -100).sum())
        torch.testing.assert_close(loss, total / divisor)


def test_mtp_reads_the_named_states() -> None:
    """Each option changes what the modules compute, with the same weights."""
    seen = []
    for options in (
        {},
        {"mtp_input_state": "pre_norm"},
        {"mtp_chain_state": "pre_norm"},
    ):
        model = small(num_nextn_predict_layers=2, **options)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.2, 2.0)
        torch.manual_seed(1)
        seen.append(model(ids_of(model)[:, :9], use_mtp=True).mtp_logits)
    default, input_pre, chain_pre = seen
    assert not torch.allclose(default[0], input_pre[0])
    assert torch.equal(default[0], chain_pre[0])  # chaining begins at the second module
    assert not torch.allclose(default[1], chain_pre[1])


def test_mtp_position_i_never_sees_beyond_the_token_it_reads() -> None:
    """Depth k at position i may see tokens up to i + k; what comes later must not change it."""
    model = small(num_nextn_predict_layers=2)
    ids = ids_of(model, 1, 10)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % model.config.vocab_size
    a, b = model(ids, use_mtp=True), model(changed, use_mtp=True)
    torch.testing.assert_close(a.logits[:, :7], b.logits[:, :7])
    for k in (1, 2):
        torch.testing.assert_close(a.mtp_logits[k - 1][:, : 7 - k], b.mtp_logits[k - 1][:, : 7 - k])
        assert (a.mtp_logits[k - 1][:, 7 - k] - b.mtp_logits[k - 1][:, 7 - k]).abs().max() > 0.1


def test_mtp_runs_only_when_asked_or_with_labels() -> None:
    model = small()
    ids = ids_of(model)
    assert model(ids).mtp_logits == ()
    assert len(model(ids).routing) == 1
    assert len(model(ids, labels=ids).routing) == 2
    assert model(ids, labels=ids, use_mtp=False).mtp_losses == ()


def test_mtp_on_a_sequence_too_short_for_it_is_left_out() -> None:
    model = small(num_nextn_predict_layers=3)
    output = model(ids_of(model, 2, 2), use_mtp=True)
    assert len(output.mtp_logits) == 1


def test_mtp_shares_embedding_and_head() -> None:
    model = small()
    ids = ids_of(model)
    sum(model(ids, labels=ids).mtp_losses).backward()
    assert model.embedding.weight.grad.abs().sum() > 0
    assert model.head.weight.grad.abs().sum() > 0
    own = sum(p.numel() for p in model.mtp.parameters()) + model.mtp[0].block.feed_forward.router.bias.numel()
    assert own == model.config.num_parameters().mtp


def test_losses_without_logits_equal_losses_with_them() -> None:
    model = small(num_nextn_predict_layers=2)
    ids = ids_of(model)
    with_logits, without = model(ids, labels=ids), model(ids, labels=ids, return_logits=False)
    assert without.logits is None
    assert without.mtp_logits == ()
    assert torch.equal(with_logits.loss, without.loss)
    assert with_logits.mtp_losses == without.mtp_losses
    expected = F.cross_entropy(with_logits.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(without.loss, expected)
    torch.testing.assert_close(without.token_losses.sum() / ids[:, 1:].numel(), without.loss)
    assert (without.token_losses[:, -1] == 0).all()


def test_no_logits_of_all_positions_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a step stays below all positions times vocabulary."""
    monkeypatch.setattr("lightning_dsv3.ops.cross_entropy._CHUNK_ELEMENTS", 512)
    model = small(vocab_size=71)
    ids = ids_of(model, 4, 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and 71 in out.shape:
                largest = max(largest, out.numel())
            return out

    with Watch():
        output = model(ids, labels=ids, return_logits=False)
        (output.loss + output.mtp_losses[0]).backward()
    assert 0 < largest < ids.numel() * 71
    assert largest <= max(512, 71 * 32)  # a chunk, or the head's own matrix


def test_all_tokens_on_one_expert_are_all_computed() -> None:
    torch.manual_seed(0)
    experts = Experts(4, 8, 8)
    torch.nn.init.normal_(experts.gate_up)
    torch.nn.init.normal_(experts.down)
    x, gate = torch.randn(33, 8), torch.rand(33, 1)
    y = experts(x, gate, torch.full((33, 1), 2))
    g, u = (x @ experts.gate_up[2].T).chunk(2, -1)
    torch.testing.assert_close(y, gate * ((F.silu(g) * u) @ experts.down[2].T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_routing_bias_stays_float32_and_keeps_its_value_under_casts(convert) -> None:  # type: ignore[no-untyped-def]
    model = small()
    router = model.blocks[1].feed_forward.router
    router.bias.fill_(5.001)
    convert(model)
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, torch.full((8,), 5.001))
    assert router.weight.dtype != torch.float32


def test_bias_changes_the_choice_and_not_the_gradient_path() -> None:
    model = small()
    router = model.blocks[1].feed_forward.router
    x = torch.randn(20, 32)
    before = router(x)
    router.bias[5] += 10
    after = router(x)
    assert (after.expert_TK == 5).any(-1).all()
    assert torch.equal(before.affinity_TE, after.affinity_TE)
    assert not router.bias.requires_grad
    assert "bias" in dict(router.named_buffers())
    assert "blocks.1.feed_forward.router.bias" in model.state_dict()


def test_routing_under_bfloat16_autocast_is_float32() -> None:
    model = small()
    router = model.blocks[1].feed_forward.router
    x = torch.randn(20, 32)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x)
    assert mixed.affinity_TE.dtype == mixed.gate_TK.dtype == torch.float32
    assert torch.equal(plain.affinity_TE, mixed.affinity_TE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_trains_in_other_dtypes(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    ids = ids_of(model)
    output = model(ids, labels=ids)
    (output.loss + sum(output.mtp_losses)).backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    reference = small()
    expected = reference(ids, labels=ids).loss.detach()
    assert abs(float(output.loss.detach()) - float(expected)) < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_loss_is_near_float32_and_gradients_reach_every_parameter() -> None:
    model = small()
    ids = ids_of(model)
    expected = float(model(ids, labels=ids).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, return_logits=False)
    (output.loss + sum(output.mtp_losses)).backward()
    assert abs(float(output.loss.detach()) - expected) < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_greedy_method_has_no_bias_and_ignores_groups() -> None:
    model = small(topk_method="greedy", scoring_func="softmax", norm_topk_prob=False)
    router = model.blocks[1].feed_forward.router
    assert isinstance(router, Router)
    assert router.bias is None
    assert not any("bias" in name for name in model.state_dict())
    routing = router(torch.randn(9, 32))
    assert torch.equal(routing.expert_TK.sort(-1).values, routing.affinity_TE.topk(2).indices.sort(-1).values)


def test_initial_weights_have_the_configured_deviation() -> None:
    model = small(hidden_size=64, initializer_range=0.006)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() > 2000:
            assert float(parameter.detach().std()) == pytest.approx(0.006, rel=0.1), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
