"""BalanceLossCallback on models of transformers, in real Trainers: values, gradients, and what must not add twice."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from ranks import run_on_ranks
from tiny_moe import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dsv3.callbacks import BalanceLossCallback
from lightning_dsv3.callbacks.balance_losses import routing_from_logits
from lightning_dsv3.config import BalanceArgs, ConfigError, DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.ops.balance_losses import router_z_loss, sequence_balance_loss
from lightning_dsv3.ops.balance_methods import balance_terms

transformers = pytest.importorskip("transformers")

ROWS, LENGTH, EXPERTS, K = 4, 6, 5, 2
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": K,
    "max_position_embeddings": 64,
}  # fmt: skip
STRONG = {"sequence": {"alpha": 1.0}, "z": {"alpha": 0.5}, "global_batch": {"alpha": 1.0}}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS, attn_implementation="eager")
    )


def qwen3() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[], attn_implementation="eager"
        )
    )


def deepseek_v3() -> nn.Module:
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **(SIZES | {"head_dim": 4}), n_routed_experts=EXPERTS, n_group=1, topk_group=1, first_k_dense_replace=1,
            q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
            attn_implementation="eager",
        )
    )  # fmt: skip


class Foreign(pl.LightningModule):
    """Somebody's module: it knows nothing of balance losses."""

    def __init__(self, make: Any = mixtral, returns: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = make()
        self.model.config.use_cache = False
        nn.init.normal_(self.model.lm_head.weight)
        for name, p in self.model.named_parameters():
            if ("gate.weight" in name or "router" in name) and p.shape[0] == EXPERTS:
                nn.init.normal_(p, std=0.5)
        self.returns = returns
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.model(input_ids=batch, labels=batch).loss
        return {"tensor": loss, "dict": {"loss": loss, "kept": 1}, "none": None}[self.returns]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(input_ids=batch, labels=batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "loss" in outputs:
            self.losses.append(outputs["loss"].item())

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def ids(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randint(0, 31, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def loader(rows: int = ROWS, batch_size: int = ROWS) -> DataLoader:
    return DataLoader(list(ids(rows)), batch_size=batch_size)


def fitted(module: Foreign, *callbacks: Any, rows: int = ROWS, batch_size: int = ROWS, **arguments: Any) -> Any:
    trainer = make_trainer(*callbacks, **arguments)
    trainer.fit(module, loader(rows, batch_size))
    return trainer


def by_hand(module: Foreign, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence and z losses of a batch from `output_router_logits`, and the main loss."""
    output = module.model(input_ids=batch, labels=batch, output_router_logits=True)
    assert len(output.router_logits) == 2
    added = torch.zeros(())
    for logits in output.router_logits:
        p = logits.float().softmax(-1)
        added = added + sequence_balance_loss(
            affinity_TE=p, expert_TK=p.topk(K).indices, num_sequences=len(batch), alpha=1.0
        )
        added = added + router_z_loss(logits_TE=logits, alpha=0.5)
    return added, module.model(input_ids=batch, labels=batch).loss


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def gradients(module: Foreign, loss: Tensor) -> dict[str, Tensor]:
    parameters = {n: p for n, p in module.model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, got, strict=True) if g is not None}


@pytest.mark.parametrize("make", [mixtral, qwen3])
@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_loss_and_every_gradient_are_those_of_the_losses_by_hand(make, returns):
    module = Foreign(make, returns)
    trainer = fitted(module, BalanceLossCallback(["sequence", "z"], STRONG))
    added, main = by_hand(module, ids())
    assert module.losses == pytest.approx([(added + main).item()], rel=1e-5)
    assert_gradients(module.steps[0], gradients(module, added + main))
    logged = trainer.callback_metrics
    assert (logged["train/balance/sequence"] + logged["train/balance/z"]).item() == pytest.approx(added.item())
    gate = next(n for n in module.steps[0] if n.endswith("gate.weight") and module.steps[0][n].shape[0] == EXPERTS)
    main_alone = gradients(module, module.model(input_ids=ids(), labels=ids()).loss)[gate]
    assert (module.steps[0][gate] - main_alone).abs().max() > 1e-2, "the losses reach the router"


def test_a_sigmoid_router_has_normalised_sigmoid_affinities():
    module = Foreign(deepseek_v3)
    trainer = fitted(module, BalanceLossCallback(["sequence"], STRONG))
    seen: list[Any] = []
    router = next(m for m in module.modules() if type(m).__name__ == "DeepseekV3TopkRouter")
    router.register_forward_hook(lambda m, a, output: seen.append(output))
    module.model(input_ids=ids())
    ((logits, _, chosen),) = seen
    expected = sequence_balance_loss(
        affinity_TE=logits.sigmoid(), expert_TK=chosen, num_sequences=ROWS, alpha=1.0
    ).item()
    assert trainer.callback_metrics["train/balance/sequence"].item() == pytest.approx(expected, rel=1e-5)


def test_accumulation_averages_them_as_it_averages_the_loss():
    module = Foreign()
    fitted(module, BalanceLossCallback(["sequence", "z"], STRONG), batch_size=2, accumulate_grad_batches=2)
    halves = [sum(by_hand(module, half)) for half in ids().split(2)]
    assert_gradients(module.steps[0], gradients(module, (halves[0] + halves[1]) / 2))


def test_checkpointed_layers_add_once():
    plain, recomputed = Foreign(), Foreign()
    recomputed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in (plain, recomputed):
        fitted(module, BalanceLossCallback(["sequence", "global_batch", "z"], STRONG))
    assert plain.losses == recomputed.losses
    assert_gradients(recomputed.steps[0], plain.steps[0])


def test_reentrant_checkpointing_is_refused_with_the_remedy():
    module = Foreign()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(MisconfigurationException, match=r"no gradient.*use_reentrant"):
        fitted(module, BalanceLossCallback(["sequence"]))


def test_losses_are_float32_and_in_the_backward_under_bf16_autocast():
    module = Foreign()
    trainer = fitted(module, BalanceLossCallback(["sequence", "z"], STRONG), precision="bf16-mixed")
    added, _ = by_hand(module, ids())
    sum_logged = trainer.callback_metrics["train/balance/sequence"] + trainer.callback_metrics["train/balance/z"]
    assert sum_logged.dtype == torch.float32
    assert sum_logged.item() == pytest.approx(added.item(), rel=2e-2)


def test_a_gradient_scaler_scales_them_with_the_loss():
    class Scaled(pl.plugins.MixedPrecision):
        def __init__(self) -> None:
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

        def forward_context(self) -> Any:  # float32, so that only the scale differs
            return torch.autocast("cpu", enabled=False)

    plain, scaled = Foreign(), Foreign()
    fitted(plain, BalanceLossCallback(["sequence", "z"], STRONG), batch_size=2, accumulate_grad_batches=2)
    fitted(
        scaled, BalanceLossCallback(["sequence", "z"], STRONG), batch_size=2, accumulate_grad_batches=2,
        plugins=[Scaled()],
    )  # fmt: skip
    assert_gradients(scaled.steps[0], plain.steps[0])


def test_validation_and_other_forwards_add_nothing_and_the_module_is_left_as_it_was():
    module = Foreign()
    callback = BalanceLossCallback(["global_batch"], STRONG)
    trainer = make_trainer(callback, val_check_interval=1, accumulate_grad_batches=2)
    trainer.fit(module, loader(4, 2), loader(3, 3))
    reference = Foreign()
    fitted(reference, BalanceLossCallback(["global_batch"], STRONG), rows=4, batch_size=2, accumulate_grad_batches=2)
    assert module.losses == reference.losses
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks for m in module.modules())


def test_the_window_of_counts_begins_anew_at_each_step():
    module = Foreign()
    fitted(module, BalanceLossCallback(["global_batch"], STRONG), rows=8, batch_size=4)
    seen = [Foreign() for _ in range(2)]
    for other, batch in zip(seen, ids(8).split(4), strict=True):
        make_trainer(BalanceLossCallback(["global_batch"], STRONG)).fit(other, DataLoader(list(batch), batch_size=4))
    assert module.losses == [other.losses[0] for other in seen]


def on_ranks(world_size: int) -> dict[str, Tensor]:
    module = Foreign()
    trainer = make_trainer(
        BalanceLossCallback(["global_batch", "z"], STRONG), devices=world_size, use_distributed_sampler=False,
        strategy="ddp" if world_size > 1 else "auto",
    )  # fmt: skip
    rows = list(ids(4))[trainer.global_rank :: world_size]
    trainer.fit(module, DataLoader(rows, batch_size=4 // world_size))
    return module.steps[0]


@pytest.mark.distributed
def test_two_ranks_equal_one():
    one = on_ranks(1)
    for rank in run_on_ranks(2, on_ranks, 2):
        assert_gradients(rank, one)


class OwnRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = x @ self.weight.T
        return {"logits": logits, "top": logits.topk(K).indices}


class Own(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = OwnRouter()
        self.called = True

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.router(batch)["logits"].mean() if self.called else self.router.weight.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(router: nn.Module, output: dict[str, Tensor]) -> Any:
    return routing_from_logits(output["logits"], output["top"])


def test_a_private_router_is_read_as_the_user_says():
    module, x = Own(), torch.randn(2, 7, 3)
    before = module.router.weight.detach().clone()
    trainer = make_trainer(
        BalanceLossCallback(["sequence", "cv2"], {"sequence": {"alpha": 1.0}}, routers={"OwnRouter": read})
    )
    trainer.fit(module, DataLoader(list(x), batch_size=2))
    logits = x @ before.T
    terms = balance_terms(
        [routing_from_logits(logits, logits.topk(K).indices)],
        methods=["sequence", "cv2"],
        args=BalanceArgs.of({"sequence": {"alpha": 1.0}}),
        num_sequences=2,
    )
    for method, value in terms.losses.items():
        assert trainer.callback_metrics[f"train/balance/{method}"].item() == pytest.approx(value.item(), rel=1e-5)


def test_our_own_routers_inside_another_module_and_subclasses_of_known_ones_are_read():
    class Ours(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", vocab_size=31, hidden_size=32))

    trainer = fitted(Ours(), BalanceLossCallback(["sequence"], STRONG))
    expected = Ours().model(input_ids=ids(), labels=ids()).routing
    loss = balance_terms(expected, methods=["sequence"], args=BalanceArgs.of(STRONG), num_sequences=ROWS)
    logged = trainer.callback_metrics["train/balance/sequence"]
    assert logged.item() == pytest.approx(loss.losses["sequence"].item(), rel=1e-5)

    module = Foreign()
    for router in [m for m in module.modules() if type(m).__name__ == "MixtralTopKRouter"]:
        router.__class__ = type("FSDPMixtralTopKRouter", (type(router),), {})
    plain = Foreign()
    for each in (module, plain):
        fitted(each, BalanceLossCallback(["sequence"], STRONG))
    assert module.losses == plain.losses


def test_a_batch_that_training_step_skips_is_skipped():
    fitted(Foreign(returns="none"), BalanceLossCallback(["sequence"]))


def test_what_cannot_work_is_named():
    data = DataLoader(list(torch.randn(2, 7, 3)), batch_size=2)
    with pytest.raises(MisconfigurationException, match=r"found no router in Own.*routing_from_logits"):
        make_trainer(BalanceLossCallback()).fit(Own(), data)
    module = Own()
    module.called = False
    with pytest.raises(MisconfigurationException, match="called none of the 1 routers"):
        make_trainer(BalanceLossCallback(routers={"OwnRouter": read})).fit(module, data)
    assert "training_step" not in module.__dict__
    module = Own()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"manually.*balance_terms"):
        make_trainer(BalanceLossCallback(routers={"OwnRouter": read})).fit(module, data)
    with pytest.raises(ConfigError, match="aux_free"):
        BalanceLossCallback(["aux_free"])
    with pytest.raises(ConfigError, match="num_groups"):
        BalanceLossCallback(["v2"])
