"""Options that change no result: activation checkpointing and torch.compile, held against the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config
from lightning_dsv3.balance import RouterObserver, find_routers
from lightning_dsv3.parallel import checkpoint_blocks, compile_model

POLICIES = ["block", "keep_routing"]


def make_model(**overrides) -> DeepSeekV3:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 97, "num_nextn_predict_layers": 1}
    model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", **{**sizes, **overrides}))
    for router in find_routers(model):
        nn.init.normal_(router.module.weight)
        nn.init.normal_(router.bias, std=0.1)
    return model


def step(model: DeepSeekV3) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[int]]]:
    """Outputs, gradients and the callback's counts (int64, by hook) of one training step."""
    observer = RouterObserver(find_routers(model))
    observer.attach()
    observer.start("cpu")
    observer.open()
    ids = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    output = model(ids, labels=ids)
    affinity_loss = sum(routing.affinity_TE.pow(2).mean() for routing in output.routing)
    (output.loss + 0.3 * output.mtp_losses[0] + affinity_loss).backward()
    observer.close()
    assert observer.unobserved() == []
    counts = [counts.tolist() for counts in observer.take()]
    observer.detach()
    outputs = {"logits": output.logits, "mtp": output.mtp_logits[0], "token_losses": output.token_losses}
    outputs |= {f"experts.{i}": routing.expert_TK for i, routing in enumerate(output.routing)}
    return (
        {name: value.detach() for name, value in outputs.items()},
        {name: p.grad for name, p in model.named_parameters()},
        counts,
    )


def assert_same_step(changed: DeepSeekV3, plain: DeepSeekV3, tolerance: float = 0.0) -> None:
    for ours, theirs in zip(step(changed)[:2], step(plain)[:2], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert value is not None, name
            torch.testing.assert_close(
                ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    changed.zero_grad()
    plain.zero_grad()
    counts = step(plain)[2]
    assert step(changed)[2] == counts
    assert all(sum(layer) > 0 for layer in counts)


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


class TestCheckpointing:
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize(
        "overrides", [{}, {"scoring_func": "softmax", "q_lora_rank": None}], ids=["sigmoid", "softmax"]
    )
    def test_outputs_gradients_and_counts_are_bitwise_those_of_the_plain_model(self, policy, overrides):
        plain = make_model(**overrides)
        assert_same_step(checkpoint_blocks(copy.deepcopy(plain), policy), plain)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_under_autocast_as_well(self, policy):
        plain = make_model()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_step(checkpoint_blocks(copy.deepcopy(plain), policy), plain)

    @pytest.mark.parametrize(("policy", "repeated"), [("none", False), ("block", True), ("keep_routing", False)])
    def test_only_whole_blocks_choose_again(self, policy, repeated):
        model = checkpoint_blocks(make_model(), policy)
        ids = torch.randint(0, 97, (2, 13))
        loss = model(ids, labels=ids).loss
        with OpCounter() as backward:
            loss.backward()
        assert ("aten.topk.default" in backward.calls) is repeated
        assert ("aten.sort.stable" in backward.calls) is repeated
        recomputes_the_experts = backward.calls.get("aten.silu.default", 0) > 0
        assert recomputes_the_experts is (policy != "none")

    @pytest.mark.parametrize("policy", POLICIES)
    def test_fewer_activations_are_kept(self, policy):
        def kept(model: nn.Module) -> int:
            sizes = {}
            ids = torch.randint(0, 97, (2, 64))

            def pack(tensor: Tensor) -> Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(ids, labels=ids, return_logits=False)
            return sum(sizes.values())

        plain = make_model()
        assert kept(checkpoint_blocks(copy.deepcopy(plain), policy)) < kept(plain)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_names_and_state_dict_stay(self, policy):
        plain = make_model()
        model = checkpoint_blocks(copy.deepcopy(plain), policy)
        assert list(model.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(model.state_dict())
        assert [router.name for router in find_routers(model)] == ["layer_1", "layer_2", "mtp_1"]

    def test_a_copy_recomputes_its_own_blocks(self):
        model = checkpoint_blocks(make_model(), "keep_routing")
        twin = copy.deepcopy(model)
        step(twin)
        assert all(p.grad is None for p in model.parameters())
        assert all(p.grad is not None for p in twin.parameters())

    def test_none_undoes_it(self):
        plain = make_model()
        model = checkpoint_blocks(checkpoint_blocks(copy.deepcopy(plain), "block"), "none")
        assert {type(block) for block in model.blocks} == {type(block) for block in plain.blocks}

    def test_what_cannot_be_done_is_said(self):
        with pytest.raises(ValueError, match=r"'all' is not one of none, block, keep_routing"):
            checkpoint_blocks(make_model(), "all")
        with pytest.raises(ValueError, match=r"Linear holds no TransformerBlock"):
            checkpoint_blocks(nn.Linear(2, 2))


class TestChunkedLoss:
    @pytest.mark.parametrize("columns", [1, 5])
    def test_outputs_gradients_and_counts_are_those_of_one_chunk(self, columns: int, monkeypatch):
        plain = make_model()
        whole = step(plain)
        plain.zero_grad()
        monkeypatch.setattr("lightning_dsv3.ops.cross_entropy._CHUNK_ELEMENTS", 97 * columns)
        chunked = step(plain)
        for ours, theirs in zip(chunked[:2], whole[:2], strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert chunked[2] == whole[2]


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("part", "dtype", "tolerance"),
        # aot_eager runs the same kernels on decomposed graphs: only orders of summation and roundings differ.
        [("blocks", torch.float32, 1e-5), ("model", torch.float32, 1e-5), ("blocks", torch.bfloat16, 2e-2)],
        ids=["blocks-float32", "model-float32", "blocks-bfloat16"],
    )
    def test_outputs_gradients_and_counts_are_those_of_the_plain_model(self, part, dtype, tolerance):
        plain = make_model().to(dtype)
        assert_same_step(compile_model(copy.deepcopy(plain), part, backend="aot_eager"), plain, tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_block_has_no_graph_break(self, dtype):
        model = compile_model(make_model(), "blocks", backend="aot_eager", fullgraph=True).to(dtype)
        ids = torch.randint(0, 97, (2, 13))
        model(ids, labels=ids).loss.backward()  # fullgraph raises at a break

    def test_names_and_state_dict_stay(self):
        plain = make_model()
        model = compile_model(compile_model(copy.deepcopy(plain), "blocks", backend="eager"), backend="eager")
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [router.name for router in find_routers(model)] == ["layer_1", "layer_2", "mtp_1"]

    @pytest.mark.slow
    @pytest.mark.parametrize("part", ["blocks", "model"])
    def test_inductor_gives_the_plain_model(self, part: str):
        plain = make_model()
        assert_same_step(compile_model(copy.deepcopy(plain), part), plain, tolerance=1e-4)

    def test_a_model_without_blocks_is_refused(self):
        with pytest.raises(ValueError, match=r"Linear holds no TransformerBlock"):
            compile_model(nn.Linear(2, 2), "blocks")
