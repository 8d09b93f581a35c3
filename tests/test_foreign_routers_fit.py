"""AuxFreeBalanceCallback with Hugging Face models in a real Trainer, held against what their experts were given."""

from __future__ import annotations

import pytest
import torch
import transformers
from foreign_training import COMMON, RATE, WITH_BIAS, WITHOUT_BIAS, LanguageModel, build_model, fit, moved, tokens
from tiny_moe import make_trainer
from torch import nn

from lightning_dsv3.balance import find_routers
from lightning_dsv3.callbacks import AuxFreeBalanceCallback, ExpertLoadMonitor


class FollowsTheRule(LanguageModel):
    """After every step, holds each bias against the rule on what the experts were given in that step."""

    steps = 0

    def on_train_start(self) -> None:
        self.expected = {router.name: router.bias.tolist() for router in find_routers(self.model)}

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.steps += 1
        for router, given in zip(find_routers(self.model), self.given.values(), strict=True):
            load = given[: router.num_experts]
            assert sum(load) == batch.numel() * 2
            self.expected[router.name] = moved(self.expected[router.name], load)
            assert router.bias.tolist() == self.expected[router.name]
            assert any(self.expected[router.name])
        self.given = {}


@pytest.mark.parametrize("family", WITH_BIAS)
def test_a_model_with_a_bias_follows_the_rule(family):
    module = FollowsTheRule(build_model(family))
    fit(module, AuxFreeBalanceCallback(RATE))
    assert module.steps == 3
    if family == "longcat_flash":
        [router] = find_routers(module.model)
        assert router.num_experts == 8 + 3


@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_a_model_without_a_bias_follows_the_rule_when_it_gets_one(family):
    module = FollowsTheRule(build_model(family))
    fit(module, AuxFreeBalanceCallback(RATE, install_bias=True))
    assert module.steps == 3


def test_a_model_with_hash_routers_is_moved_in_its_learned_layers_only():
    settings = {"mlp_layer_types": ["hash_moe", "moe"], "layer_types": ["sliding_attention"] * 2, "o_groups": 2}
    settings |= {"n_routed_experts": 8, "q_lora_rank": 8, "head_dim": 8, "o_lora_rank": 8, "index_head_dim": 8}
    torch.manual_seed(0)
    module = LanguageModel(transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**COMMON | settings)))
    fit(module, AuxFreeBalanceCallback(RATE), rows=2)
    [router] = find_routers(module)
    assert (router.name, type(router.module).__name__) == ("layer_1", "DeepseekV4TopKRouter")
    assert router.bias.tolist() == moved([0.0] * 8, module.given["model.layers.1.mlp.experts"][:8])
    assert any(router.bias)


def test_llama4_which_shows_scores_and_no_ids_follows_the_rule():
    class Llama4(LanguageModel):
        """Its experts are given all tokens, times a score that is 0 for those that did not choose them."""

        def _recorder(self, path):
            def record(module, args):
                if self.training:
                    chosen = args[0].view(8, -1, 16).abs().sum(-1) > 0
                    loads.setdefault(path, []).append(chosen.sum(-1).tolist())

            return record

    loads: dict[str, list[list[int]]] = {}
    settings = {"num_local_experts": 8, "intermediate_size_mlp": 8, "head_dim": 8, "moe_layers": [0, 1]}
    settings = {name: value for name, value in (COMMON | settings).items() if name != "moe_intermediate_size"}
    torch.manual_seed(0)
    module = Llama4(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings)))
    fit(module, AuxFreeBalanceCallback(RATE, install_bias=True))
    for router, layer_loads in zip(find_routers(module), loads.values(), strict=True):
        bias = [0.0] * 8
        for load in layer_loads:
            assert sum(load) == 2 * 2 * 9
            bias = moved(bias, load)
        assert router.bias.tolist() == bias
        assert any(bias)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "qwen3_moe"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_count_twice(family, use_reentrant):
    model = build_model(family)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    class CountsForwardsOnly(FollowsTheRule):
        def _recorder(self, path):
            record = super()._recorder(path)
            return lambda module, args: None if torch._C._current_graph_task_id() != -1 else record(module, args)

    module = CountsForwardsOnly(model)
    fit(module, AuxFreeBalanceCallback(RATE, install_bias=True))
    assert module.steps == 3


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_moe"])
def test_a_compiled_model_follows_the_rule(family):
    class Compiled(LanguageModel):
        def on_fit_start(self) -> None:
            for layer in self.model.model.layers:
                layer.mlp.gate.compile(backend="eager") if hasattr(layer.mlp, "gate") else None

    module = Compiled(build_model(family))
    reference = LanguageModel(build_model(family))
    for each in (module, reference):
        fit(each, AuxFreeBalanceCallback(RATE, install_bias=True))
    for compiled, plain in zip(find_routers(module.model), find_routers(reference.model), strict=True):
        assert compiled.bias.any()
        assert compiled.bias.tolist() == plain.bias.tolist()


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_load_becomes_balanced(rule):
    """A trained bias does its work in a model that was not made for it."""
    logged = {}
    for rate in (0.0, 0.02):
        module = LanguageModel(build_model("qwen3_moe"), lr=0.0)
        callback = AuxFreeBalanceCallback(rate, rule=rule, install_bias=True)
        trainer = fit(module, callback, rows=2, max_epochs=60)
        logged[rate] = float(trainer.callback_metrics["moe/max_violation"])
    assert logged[0.02] < 0.5 * logged[0.0]


def test_a_trainable_bias_is_taken_from_the_optimizer_and_that_is_said_once():
    module = FollowsTheRule(build_model("afmoe"))
    for router in find_routers(module.model):
        router.bias_tensor.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"trainable parameter.*layer_0, layer_1"):
        fit(module, AuxFreeBalanceCallback(RATE))
    assert not any(router.bias_tensor.requires_grad for router in find_routers(module.model))
    assert module.steps == 3


def test_the_load_monitor_knows_the_routers_as_well():
    module, monitor = LanguageModel(build_model("mixtral")), ExpertLoadMonitor()
    make_trainer(monitor).validate(module, tokens(), verbose=False)
    assert monitor.loads["layers"] == ["layer_0", "layer_1"]
    assert monitor.loads["tokens"] == {"all": 6 * 9}


class TestFreezing:
    def biases(self, **arguments) -> dict[str, bool]:
        module = LanguageModel(build_model("minimax_m2"))
        trainer = fit(module, AuxFreeBalanceCallback(RATE, **arguments))
        assert {"moe/layer_0/max_violation", "moe/layer_1/max_violation"} <= set(trainer.callback_metrics)
        return {router.name: bool(router.bias.any()) for router in find_routers(module.model)}

    def test_all_layers(self):
        assert self.biases(freeze=True) == {"layer_0": False, "layer_1": False}

    def test_layers_by_name_path_and_pattern(self):
        assert self.biases(freeze=["layer_0"]) == {"layer_0": False, "layer_1": True}
        assert self.biases(freeze="*.layers.1.*") == {"layer_0": True, "layer_1": False}

    def test_a_name_of_no_layer_is_an_error_that_lists_them(self):
        with pytest.raises(ValueError, match=r"No router is like 'layer_7'.*layer_0, layer_1"):
            self.biases(freeze=["layer_7"])

    def test_after_a_number_of_tokens(self):
        class Watched(LanguageModel):
            def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
                seen.append([router.bias.tolist() for router in find_routers(self.model)])

        seen: list[list[list[float]]] = []
        fit(Watched(build_model("minimax_m2")), AuxFreeBalanceCallback(RATE, freeze_after_tokens=2 * 18))
        assert len(seen) == 3
        assert seen[0] != seen[1] == seen[2]


class TestWhatIsNotFinite:
    def test_nan_logits_stop_the_update_with_an_error_that_names_the_layer(self):
        class Breaks(LanguageModel):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    with torch.no_grad():
                        self.model.model.layers[1].mlp.gate.weight[3] = float("nan")
                loss = super().training_step(batch, batch_idx)
                return loss.nan_to_num() if batch_idx == 1 else loss

            def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
                self.after_first = [router.bias.tolist() for router in find_routers(self.model)]

        module = Breaks(build_model("minimax_m2"), lr=0.0)
        with pytest.raises(RuntimeError, match=r"layer_1 \(.*gate\): its gate values were not finite in 1 forward"):
            fit(module, AuxFreeBalanceCallback(RATE))
        after = [router.bias.tolist() for router in find_routers(module.model)]
        assert after[1] == module.after_first[1]
        assert after[0] != module.after_first[0]

    def test_a_bias_that_is_not_finite_is_an_error_that_names_the_layer(self):
        module = LanguageModel(build_model("deepseek_v3"))
        find_routers(module.model)[0].bias[2] = float("inf")
        with pytest.raises(RuntimeError, match=r"layer_1 .*its bias is not finite"):
            fit(module, AuxFreeBalanceCallback(RATE))


class TestSharing:
    def test_layers_may_have_different_numbers_of_experts(self):
        class Both(LanguageModel):
            def __init__(self) -> None:
                model = nn.ModuleDict({"a": build_model("deepseek_v3"), "b": build_model("longcat_flash")})
                super().__init__(model)

            def training_step(self, batch, batch_idx):
                return sum(model(input_ids=batch, labels=batch).loss for model in self.model.values())

        module = Both()
        fit(module, AuxFreeBalanceCallback(RATE))
        routers = find_routers(module.model)
        assert sorted(router.num_experts for router in routers) == [8, 11]
        assert all(router.bias.any() for router in routers)
