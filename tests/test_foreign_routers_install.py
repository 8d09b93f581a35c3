"""install_bias=True: routers without a bias get one that moves their choice and nothing else."""

from __future__ import annotations

import copy
import pickle

import foreign_models
import pytest
import torch
import torch.nn.functional as F
from foreign_models import HIDDEN
from foreign_training import RATE, LanguageModel, build_model, fit, tokens
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_foreign_routers import BIASED, ROUTERS, names
from tiny_moe import make_trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dsv3.balance import find_routers, install_biases
from lightning_dsv3.balance.hugging_face import output_tensors
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

UNBIASED = [entry for entry in ROUTERS if entry not in BIASED]
# sparsemixer takes the greatest of noisy logits, twice.
REFUSED = {"PhimoeTopKRouter"}
INSTALLABLE = [entry for entry in UNBIASED if entry[2] not in REFUSED]


def build(class_name: str) -> nn.Module:
    [entry] = [entry for entry in UNBIASED if entry[2] == class_name]
    return foreign_models.router_case(*entry, with_block=False).router


def observed(router: nn.Module):
    [found] = find_routers(router)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", INSTALLABLE, ids=names(INSTALLABLE))
def test_a_bias_of_0_changes_no_bit_and_a_large_one_is_followed(entry, dtype):
    plain = foreign_models.router_case(*entry, with_block=False).router.to(dtype)
    biased = copy.deepcopy(plain)
    assert len(install_biases(biased)) == 1
    x = torch.randn(63, HIDDEN).to(dtype)
    results = []
    for router in (plain, biased):
        x_TD = x.clone().requires_grad_()
        output = output_tensors(router(x_TD))
        sum(tensor.float().square().sum() for tensor in output if tensor.is_floating_point()).backward()
        results.append([*output, x_TD.grad, *(parameter.grad for parameter in router.parameters())])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    router = observed(biased)
    assert router.bias.dtype == torch.float32
    for expert in (0, 5):
        router.bias.zero_()[expert] = 100.0
        assert (router.adapter.chosen_experts(biased, biased(x)) == expert).any(dim=-1).all()


class TestGateValues:
    """Each family's rule, written out by hand on scores without the bias."""

    @pytest.fixture
    def bias_E(self) -> Tensor:
        return 0.3 * torch.randn(8)

    def check(self, router: nn.Module, x: Tensor, bias_E: Tensor, scores: Tensor, rule) -> None:
        install_biases(router)
        observed(router).bias.copy_(bias_E)
        _, gate_TK, expert_TK = router(x)
        expected_TK = (scores + bias_E).topk(2).indices
        assert torch.equal(expert_TK.sort().values, expected_TK.sort().values)
        assert not torch.equal(expert_TK.sort().values, scores.topk(2).indices.sort().values)
        torch.testing.assert_close(gate_TK, rule(scores.gather(-1, expert_TK)), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("name", ["MixtralTopKRouter", "Qwen3_5MoeTopKRouter", "HunYuanMoEV1Gate"])
    def test_probabilities_normalised_over_the_chosen(self, name, bias_E):
        router, x = build(name), torch.randn(63, HIDDEN)
        scores = router(x)[0].softmax(-1)
        self.check(router, x, bias_E, scores, lambda s: s / s.sum(-1, keepdim=True))

    @pytest.mark.parametrize("name", ["OlmoeTopKRouter", "JambaTopKRouter"])
    def test_probabilities_as_they_are(self, name, bias_E):
        router, x = build(name), torch.randn(63, HIDDEN)
        self.check(router, x, bias_E, router(x)[0].softmax(-1), lambda s: s)

    @pytest.mark.parametrize("name", ["GptOssTopKRouter", "GraniteMoeTopKRouter", "AriaTextTopKRouter"])
    def test_a_softmax_over_the_chosen_logits(self, name, bias_E):
        router, x = build(name), torch.randn(63, HIDDEN)
        self.check(router, x, 3 * bias_E, router(x)[0], lambda s: s.softmax(-1))

    def test_a_group_is_chosen_by_biased_scores_and_the_others_stay_excluded(self, bias_E):
        router, x = build("Mistral4TopkRouter"), torch.randn(63, HIDDEN)
        scores = router(x)[0].softmax(-1)
        bias_E = bias_E - 1.0  # all biased scores are below 0, the score that an excluded expert has here
        install_biases(router)
        observed(router).bias.copy_(bias_E)
        _, gate_TK, expert_TK = router(x)
        biased = scores + bias_E
        best_group = biased.view(-1, 2, 4).topk(2).values.sum(-1).argmax(-1)
        allowed = F.one_hot(best_group, 2).bool().repeat_interleave(4, dim=-1)
        expected = biased.masked_fill(~allowed, float("-inf")).topk(2).indices
        assert torch.equal(expert_TK.sort().values, expected.sort().values)
        chosen = scores.gather(-1, expert_TK)
        gates = chosen / chosen.sum(-1, keepdim=True) if router.norm_topk_prob else chosen
        torch.testing.assert_close(gate_TK, gates * router.routed_scaling_factor)


class TestModule:
    def test_the_bias_is_in_the_state_dict_and_class_and_name_stay(self):
        router = build("MixtralTopKRouter")
        cls = type(router)
        assert install_biases(nn.ModuleDict({"gate": router})) == ["gate"]
        assert list(router.state_dict()) == ["weight", "selection_bias"]
        assert isinstance(router, cls)
        assert type(router).__name__ == cls.__name__
        assert not any(name == "selection_bias" for name, _ in router.named_parameters())

    def test_installing_again_changes_nothing(self):
        router = build("MixtralTopKRouter")
        install_biases(router)
        router.selection_bias[1] = 2.0
        cls = type(router)
        assert install_biases(router) == []
        assert type(router) is cls
        assert router.selection_bias[1] == 2.0

    def test_it_stays_float32_when_the_model_is_cast(self):
        router = build("MixtralTopKRouter")
        install_biases(router)
        router.selection_bias.fill_(5.001)
        router.to(torch.bfloat16)
        assert router.weight.dtype == torch.bfloat16
        assert router.selection_bias.dtype == torch.float32
        assert router.selection_bias[0] == torch.tensor(5.001)

    def test_a_copy_has_a_bias_of_its_own(self):
        router = build("MixtralTopKRouter")
        install_biases(router)
        copied = copy.deepcopy(router)
        copied.selection_bias[3] = 100.0
        x = torch.randn(9, HIDDEN)
        assert (copied(x)[2] == 3).any(-1).all()
        assert not (router(x)[2] == 3).any(-1).all()

    def test_it_can_be_pickled(self):
        router = build("MixtralTopKRouter")
        install_biases(router)
        router.selection_bias[3] = 100.0
        loaded = pickle.loads(pickle.dumps(router))
        x = torch.randn(9, HIDDEN)
        assert type(loaded) is type(router)
        assert all(torch.equal(a, b) for a, b in zip(router(x), loaded(x), strict=True))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_works_under_activation_checkpointing(self, use_reentrant):
        router = build("MixtralTopKRouter")
        install_biases(router)
        router.selection_bias.copy_(torch.randn(8))
        gradients = []
        for run in (router, lambda x: checkpoint(router, x, use_reentrant=use_reentrant)):
            router.zero_grad()
            torch.manual_seed(0)
            run(torch.randn(9, HIDDEN, requires_grad=True))[1].square().sum().backward()
            gradients.append(router.weight.grad.clone())
        assert torch.equal(*gradients)

    def test_works_compiled(self):
        router = build("MixtralTopKRouter")
        install_biases(router)
        router.selection_bias.copy_(torch.randn(8))
        x = torch.randn(9, HIDDEN)
        plain = router(x)
        compiled = torch.compile(router, backend="eager")
        assert all(torch.equal(a, b) for a, b in zip(plain, compiled(x), strict=True))
        router.selection_bias[2] = 100.0  # what is compiled reads the bias anew
        assert (compiled(x)[2] == 2).any(-1).all()

    def test_random_numbers_are_left_alone(self):
        router = build("MixtralTopKRouter")
        torch.manual_seed(3)
        install_biases(router)
        after = torch.rand(1)
        torch.manual_seed(3)
        assert after == torch.rand(1)

    def test_a_topk_outside_of_the_router_is_left_alone(self):
        router = build("MixtralTopKRouter")
        install_biases(router)
        router.selection_bias[3] = 100.0
        scores, seen = torch.rand(9, 8), []
        expected = scores.topk(2).indices
        router.register_forward_hook(lambda module, args, output: seen.append(scores.topk(2).indices))
        router(torch.randn(9, HIDDEN))
        assert torch.equal(seen[0], expected)


class TestRefusal:
    def test_a_router_that_chooses_otherwise_is_refused_by_name_and_left_as_it_was(self):
        router = build("PhimoeTopKRouter")
        cls = type(router)
        with pytest.raises(MisconfigurationException, match=r"PhimoeTopKRouter\) cannot be given a bias: .*torch.topk"):
            install_biases(router)
        assert type(router) is cls
        assert list(router.state_dict()) == ["weight"]

    def test_gate_values_that_follow_the_bias_are_found_out(self):
        class LeakyRouter(type(build("MixtralTopKRouter"))):
            __module__ = "transformers.models.leaky"

            def forward(self, x):
                logits, gates, chosen = super().forward(x)
                bias = getattr(self, "selection_bias", torch.zeros(8))
                return logits, gates + bias[chosen], chosen

        router = build("MixtralTopKRouter")
        router.__class__ = LeakyRouter
        with pytest.raises(MisconfigurationException, match="gate values follow the bias"):
            install_biases(router)

    def test_weights_on_the_meta_device_are_refused_with_the_remedy(self):
        with pytest.raises(MisconfigurationException, match=r"meta device.*install_biases\(model\)"):
            install_biases(build("MixtralTopKRouter").to("meta"))

    def test_without_the_argument_a_model_without_a_bias_is_an_error_that_names_it(self):
        with pytest.raises(MisconfigurationException, match=r"None of the 2 .*install_bias=True"):
            fit(LanguageModel(build_model("mixtral")), AuxFreeBalanceCallback())


class TestCheckpoints:
    def test_resume_is_bit_equal(self, tmp_path):
        modules = [LanguageModel(build_model("mixtral")) for _ in range(2)]
        whole = fit(modules[0], AuxFreeBalanceCallback(RATE, install_bias=True), max_epochs=2)
        assert whole.global_step == 6
        path = tmp_path / "half.ckpt"
        half = LanguageModel(build_model("mixtral"))
        fit(half, AuxFreeBalanceCallback(RATE, install_bias=True)).save_checkpoint(path)
        fit(modules[1], AuxFreeBalanceCallback(RATE, install_bias=True), ckpt_path=path, max_epochs=2)
        states = [module.state_dict() for module in modules]
        assert any("selection_bias" in key for key in states[0])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    @pytest.mark.parametrize("hook", ["setup", "configure_model"])
    def test_a_model_that_is_built_late_has_its_bias_before_the_checkpoint_is_loaded(self, tmp_path, hook):
        class BuiltLate(LanguageModel):
            def __init__(self) -> None:
                super().__init__(nn.Identity())

            def build(self, stage: str | None = None) -> None:
                if isinstance(self.model, nn.Identity):
                    self.model = build_model("mixtral")

        setattr(BuiltLate, hook, BuiltLate.build)
        module, again = BuiltLate(), BuiltLate()
        path = tmp_path / "last.ckpt"
        fit(module, AuxFreeBalanceCallback(RATE, install_bias=True)).save_checkpoint(path)
        fit(again, AuxFreeBalanceCallback(RATE, install_bias=True), ckpt_path=path)  # nothing is left to train
        biases = [[router.bias.tolist() for router in find_routers(each.model)] for each in (module, again)]
        assert any(biases[0][0])
        assert biases[0] == biases[1]

    def test_a_checkpoint_from_before_the_bias_is_loaded_and_starts_at_0(self, tmp_path):
        path = tmp_path / "before.ckpt"
        fit(LanguageModel(build_model("mixtral"))).save_checkpoint(path)
        module = LanguageModel(build_model("mixtral"))
        fit(module, AuxFreeBalanceCallback(RATE, install_bias=True), ckpt_path=path, max_epochs=2)
        values = {
            round(abs(value) / RATE, 3) for router in find_routers(module.model) for value in router.bias.tolist()
        }
        assert values <= {0.0, 1.0, 2.0, 3.0}
        assert values != {0.0}

    def test_validation_of_a_checkpoint_uses_its_bias(self, tmp_path):
        path = tmp_path / "last.ckpt"
        trained = LanguageModel(build_model("mixtral"))
        fit(trained, AuxFreeBalanceCallback(RATE, install_bias=True)).save_checkpoint(path)
        module = LanguageModel(build_model("mixtral"))
        trainer = make_trainer(AuxFreeBalanceCallback(install_bias=True))
        trainer.validate(module, tokens(), ckpt_path=path, verbose=False)
        trained.eval()
        module.eval()
        ids = torch.arange(9)[None]
        assert torch.equal(trained.model(input_ids=ids).logits, module.model(input_ids=ids).logits)
