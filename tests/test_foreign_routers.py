"""Every router class of the installed transformers is attached to correctly, or refused with the remedy."""

from __future__ import annotations

import copy

import foreign_models
import pytest
import torch
from foreign_models import CHOSEN, EXPERTS, TOKENS
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_dsv3.balance import NATIVE_ADAPTERS, HuggingFaceRouterAdapter, RouterAdapter, find_routers

# Gates of attention, of residuals and of detectors: nothing is chosen, so nothing is to be balanced.
NOT_ROUTERS = {
    "BailingHybridForgetGate",
    "DFineGate",
    "Deimv2Gate",
    "Glm5NextTextForgetGate",
    "GraniteDoclingDensityRouter",
    "Inkling2LoopMessageGate",
    "KimiLinearForgetGate",
    "MuseSparkResidualGate",
}
HASH_ROUTERS = {"DeepseekV4HashRouter"}
REFUSED = {"DbrxRouter", "JetMoeTopKGating", "NllbMoeTop2Router", "SwitchTransformersTop1Router", "ZayaRouter"}
# Where the bias is, if not on the router.
ELSEWHERE = {
    "AfmoeTokenChoiceRouter": "AfmoeSparseMoeBlock.expert_bias",
    "Dots3NoteVisionTopKRouter": "Dots3NoteVisionMoE.e_score_correction_bias",
    "Ernie4_5_MoeTopKRouter": "Ernie4_5_MoeStatics.e_score_correction_bias",
    "Ernie4_5_VLMoeMoeTopKRouter": "Ernie4_5_VLMoeMoeStatics.e_score_correction_bias",
    "HYV3TopKRouter": "HYV3MoE.e_score_correction_bias",
    "Lfm2MoeTopKRouter": "Lfm2MoeSparseMoeBlock.expert_bias",
    "MiniMaxM2TopKRouter": "MiniMaxM2SparseMoeBlock.e_score_correction_bias",
}
CLASSES = foreign_models.router_classes()
ROUTERS = [entry for entry in CLASSES if entry[2] not in NOT_ROUTERS | HASH_ROUTERS | REFUSED]


def names(entries):
    return [f"{family}-{name}" for family, _, name in entries]


def chosen_by(case, router, **arguments):
    return router.adapter.chosen_experts(router.module, case.call(**arguments))


def observed(case):
    [router] = [router for router in find_routers(case.root) if router.module is case.router]
    return router


@pytest.mark.parametrize("entry", ROUTERS, ids=names(ROUTERS))
def test_every_router_class_is_attached(entry):
    case = foreign_models.router_case(*entry)
    assert case is not None, "no configuration of the family builds it"
    router = observed(case)
    identity_experts = 3 if entry[0] == "longcat_flash" else 0
    assert router.num_experts == EXPERTS + identity_experts
    expert_TK = chosen_by(case, router)
    assert list(expert_TK.shape) == [TOKENS, CHOSEN]
    assert all(len(set(chosen)) == CHOSEN for chosen in expert_TK.tolist())
    assert 0 <= int(expert_TK.min()) <= int(expert_TK.max()) < router.num_experts

    # The source says whether there is a bias; that every token follows it says that it is the one which chooses.
    source = foreign_models.source(case.cls)
    has_bias = "e_score_correction_bias" in source or "expert_bias" in source or "moe_statics" in source
    assert (router.bias is not None) == has_bias
    if has_bias:
        home = f"{type(router.holder).__name__}.{foreign_models.bias_name(router.holder)}"
        assert home == ELSEWHERE.get(entry[2], f"{entry[2]}.e_score_correction_bias")
        assert router.bias.shape == (router.num_experts,)
        for expert in (0, router.num_experts - 1):
            router.bias.zero_()
            router.bias[expert] = 100.0
            assert (chosen_by(case, router) == expert).any(dim=-1).all()


BIASED = [entry for entry in ROUTERS if foreign_models.says_bias(entry)]


@pytest.mark.parametrize("entry", BIASED, ids=names(BIASED))
def test_every_router_takes_a_float32_bias_beside_bfloat16_weights(entry):
    """What lets the callback put a bias back into float32 that `bf16-true` has cast."""
    case = foreign_models.router_case(*entry)
    router = observed(case)
    case.root.to(torch.bfloat16)
    if entry[0] in ("inkling2", "inkling2_loop"):  # its forward works with float32 weights only
        case.router.weight.data = case.router.weight.float()
    router.bias_tensor.data = torch.zeros_like(router.bias_tensor, dtype=torch.float32)
    router.bias[1] = 100.0
    expert_TK = chosen_by(case, router, dtype=torch.bfloat16)
    assert (expert_TK == 1).any(dim=-1).all()
    assert router.bias.dtype == torch.float32


@pytest.mark.parametrize("entry", [e for e in CLASSES if e[2] in REFUSED], ids=lambda entry: entry[2])
def test_what_cannot_be_balanced_is_refused_with_the_remedy(entry):
    case = foreign_models.router_case(*entry)
    with pytest.raises(MisconfigurationException, match=rf"{entry[2]}\) cannot be balanced: .*routers=\[...\]"):
        find_routers(case.root)


@pytest.mark.parametrize("entry", [e for e in CLASSES if e[2] in NOT_ROUTERS | HASH_ROUTERS], ids=lambda e: e[2])
def test_gates_that_choose_nothing_and_fixed_tables_are_passed_over(entry):
    case = foreign_models.router_case(*entry, with_block=False)
    assert case is None or not any(router.module is case.router for router in find_routers(case.root))


def test_an_adapter_of_ones_own_comes_before_a_refusal():
    class DbrxAdapter(RouterAdapter):
        def matches(self, module):
            return type(module).__name__ == "DbrxRouter"

        def num_experts(self, module):
            return module.layer.out_features

        def chosen_experts(self, module, output):
            return output.topk(2).indices

        def bias(self, module):
            return None

    [entry] = [entry for entry in CLASSES if entry[2] == "DbrxRouter"]
    [router] = find_routers(foreign_models.router_case(*entry).root, [DbrxAdapter(), *NATIVE_ADAPTERS])
    assert router.bias is None


def test_the_table_says_of_every_class_what_happens():
    """Built for one class of each kind; the tests above and those of installation hold all of them."""
    wanted = {
        "DeepseekV3TopkRouter": ("DeepseekV3TopkRouter.e_score_correction_bias", "attached"),
        "MiniMaxM2TopKRouter": ("MiniMaxM2SparseMoeBlock.e_score_correction_bias", "attached"),
        "MixtralTopKRouter": ("", "install_bias=True"),
        "PhimoeTopKRouter": ("", "measured only"),
        "ZayaRouter": ("", "refused"),
        "DeepseekV4HashRouter": ("", "passed over"),
        "DFineGate": ("", "passed over"),
    }
    rows = [foreign_models.family_row(entry) for entry in CLASSES if entry[2] in wanted]
    assert {row.router: (row.bias, row.status) for row in rows} == wanted


class TestHome:
    """Where a class comes from decides, and wrappers do not hide it."""

    def router(self, module: str) -> nn.Module:
        cls = type("MoEGate", (nn.Module,), {"__module__": module, "forward": lambda self, x: (x.topk(2)[1], x, None)})
        router = cls()
        router.n_routed_experts, router.top_k = 4, 2
        router.e_score_correction_bias = nn.Parameter(torch.zeros(4))
        return router

    def test_remote_code_is_known_and_shows_its_choice_first(self):
        [router] = find_routers(
            nn.ModuleDict({"gate": self.router("transformers_modules.moonlight.modeling_deepseek")})
        )
        assert router.adapter.chosen_experts(router.module, router.module(torch.rand(3, 4))).shape == (3, 2)
        assert router.bias is router.module.e_score_correction_bias

    def test_a_gate_of_an_unknown_home_is_not(self):
        assert find_routers(nn.ModuleDict({"gate": self.router("my_project.model")})) == []

    def test_a_class_put_before_it_does_not_hide_it(self):
        router = self.router("transformers.models.some_moe.modeling_some_moe")
        router.__class__ = type("FSDPMoEGate", (type(router),), {"__module__": "torch.distributed.fsdp"})
        assert HuggingFaceRouterAdapter().matches(router)

    def test_an_output_without_ids_is_an_error_that_says_what_came(self):
        router = self.router("transformers_modules.some_moe.modeling")
        with pytest.raises(ValueError, match=r"MoEGate returned \['torch.float32 \[3, 4\]'\]: 0 .*routers=\[...\]"):
            HuggingFaceRouterAdapter().chosen_experts(router, (torch.rand(3, 4),))


class TestWrappers:
    """The block around a router is found whatever is wrapped around either."""

    @pytest.fixture
    def case(self):
        [entry] = [entry for entry in CLASSES if entry[2] == "MiniMaxM2TopKRouter"]
        return foreign_models.router_case(*entry)

    @pytest.mark.parametrize("wrapped", ["router", "block", "model"])
    @pytest.mark.parametrize("wrapper", ["compile", "checkpoint", "ddp"])
    def test_a_bias_on_the_block(self, case, wrapped, wrapper):
        def wrap(module: nn.Module) -> nn.Module:
            if wrapper == "ddp":  # what DistributedDataParallel makes of the path
                holder = nn.Module()
                holder.module = module
                return holder
            return torch.compile(module) if wrapper == "compile" else checkpoint_wrapper(module)

        block = case.block
        if wrapped == "router":
            block.gate = wrap(block.gate)
        root = nn.Module()
        root.layers = nn.ModuleList([nn.Module()])
        root.layers[0].mlp = wrap(block) if wrapped == "block" else block
        root = wrap(root) if wrapped == "model" else root
        [router] = find_routers(root)
        assert (router.name, router.path) == ("layer_0", "layers.0.mlp.gate")
        assert router.holder is block

    def test_peft_modules_to_save_are_followed_to_the_copy_that_trains(self, case):
        block = case.block
        saved = nn.Module()
        saved.original_module = block.gate
        saved.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(block.gate)})
        block.gate = saved
        [router] = find_routers(nn.ModuleDict({"mlp": block}))
        assert router.module is saved.modules_to_save["default"]
        assert router.path == "mlp.gate"
        assert router.holder is block
