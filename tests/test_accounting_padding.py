"""Padding is no load: text with padding counts, and moves the biases, exactly as the same text without it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_training import VOCABULARY, LanguageModel, build_model
from lightning.fabric.utilities.exceptions import MisconfigurationException
from ranks import run_on_ranks
from tiny_moe import RATE, D, Gate, GateAdapter, TinyMoE, data, make_router, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config, DeepSeekV3Module
from lightning_dsv3.balance import RouterObserver, find_routers, install_biases
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

LENGTHS = (9, 4, 7, 9, 3, 8, 5, 6)
TINY = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_nextn_predict_layers": 2, "initializer_range": 0.5}


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded(side: str = "right", length: int = max(LENGTHS)) -> list[dict[str, Tensor]]:
    rows = []
    for text in texts():
        ids, mask = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), None)
        ids[place], mask[place] = text, 1
        rows.append({"input_ids": ids, "attention_mask": mask})
    return rows


def observe(model: nn.Module, adapters: Any = None) -> RouterObserver:
    observer = RouterObserver(find_routers(model, adapters) if adapters else find_routers(model))
    observer.attach()
    observer.start("cpu")
    return observer


class Text(LanguageModel):
    """A Hugging Face model that is given the mask as well."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return self.model(**batch, labels=labels).loss


def own_model() -> DeepSeekV3Module:
    """With two MTP modules, which see one and two positions less per row."""
    torch.manual_seed(0)
    return DeepSeekV3Module(DeepSeekV3Config.from_preset("tiny", **TINY), learning_rate=0.0)


def foreign_model(family: str) -> Text:
    module = Text(build_model(family), lr=0.0)
    install_biases(module)
    return module


MODELS = {
    "own": own_model,
    "deepseek_v3": lambda: foreign_model("deepseek_v3"),
    "minimax_m2": lambda: foreign_model("minimax_m2"),
    "qwen3_moe": lambda: foreign_model("qwen3_moe"),
}


def train(kind: str, rows: list[dict[str, Tensor]], batch_size: int, accumulate: int, **arguments: Any) -> Any:
    """Two steps of four texts each. The proportional rule shows in the biases what was counted, not its sign alone."""
    module = MODELS[kind]()
    callback = AuxFreeBalanceCallback(RATE, rule="proportional")
    trainer = make_trainer(callback, accumulate_grad_batches=accumulate, use_distributed_sampler=False, **arguments)
    loader = DataLoader(rows[trainer.global_rank :: trainer.world_size], batch_size=batch_size)
    trainer.fit(module, loader)
    assert trainer.global_step == 2
    biases = {router.name: router.bias.tolist() for router in find_routers(module)}
    violations = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("moe/")}
    return biases, violations, callback.tokens_seen


def without_padding(kind: str) -> Any:
    return train(kind, [{"input_ids": text} for text in texts()], batch_size=1, accumulate=4)


def two_ranks(kind: str) -> Any:
    return train(kind, padded(), batch_size=1, accumulate=2, devices=2, strategy="ddp")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2)], ids=["one_batch", "accumulated"])
def test_padded_text_moves_the_biases_like_the_text_alone(kind, batch_size, accumulate):
    biases, violations, tokens_seen = train(kind, padded(), batch_size, accumulate)
    assert (biases, violations, tokens_seen) == without_padding(kind)
    assert tokens_seen == sum(LENGTHS)
    assert all(any(layer) for layer in biases.values())


@pytest.mark.parametrize("kind", ["deepseek_v3", "minimax_m2"])
def test_padding_on_the_left_is_none_of_the_load_either(kind):
    assert train(kind, padded("left"), batch_size=4, accumulate=1) == without_padding(kind)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["own", "minimax_m2"])
def test_two_ranks_with_padding_equal_one_without(kind):
    one = without_padding(kind)
    for rank in run_on_ranks(2, two_ranks, kind):
        assert rank == one


class Routes(TinyMoE):
    """A router that is called with `shape` tokens whatever the batch is."""

    def __init__(self, *shape: int) -> None:
        super().__init__(lr=0.0, model=make_router())
        self.num_tokens = math.prod(shape)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(torch.randn(self.num_tokens, D)).gate_TK.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
        return batch


class TestMask:
    """What a batch may say."""

    def tokens_seen(self, batch: Any, rows: int = 3, length: int = 5, **arguments: Any) -> int:
        callback = AuxFreeBalanceCallback(RATE, **arguments)
        make_trainer(callback).fit(Routes(rows, length), DataLoader([batch], batch_size=None))
        return callback.tokens_seen

    MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])

    @pytest.mark.parametrize("kind", ["int64", "bool", "int32", "document_numbers", "attribute"])
    def test_a_mask_of_any_integers_counts_what_is_not_0(self, kind):
        mask = {"document_numbers": self.MASK * 7}.get(kind, self.MASK)
        mask = mask.to({"bool": torch.bool, "int32": torch.int32}.get(kind, torch.int64))
        batch = SimpleNamespace(attention_mask=mask) if kind == "attribute" else {"attention_mask": mask}
        assert self.tokens_seen(batch) == 6

    def test_a_batch_without_a_mask_counts_whole(self):
        assert self.tokens_seen({"x": self.MASK}) == self.tokens_seen(self.MASK) == 15

    def test_another_key_is_used_when_named(self):
        batch = {"attention_mask": torch.ones_like(self.MASK), "is_text": self.MASK}
        assert self.tokens_seen(batch, mask_key="is_text") == 6

    def test_without_a_key_padding_counts(self):
        assert self.tokens_seen({"attention_mask": self.MASK}, mask_key=None) == 15

    def test_a_named_key_that_is_missing_is_an_error_that_names_those_there(self):
        with pytest.raises(MisconfigurationException, match=r"mask_key='is_text': the batch has the keys x, y"):
            self.tokens_seen({"x": 1, "y": 2}, mask_key="is_text")

    @pytest.mark.parametrize(
        ("mask", "what"),
        [
            (torch.zeros(3, 5), r"torch.float32 \[3, 5\]"),
            (torch.ones(3, 1, 5, 5, dtype=torch.bool), r"torch.bool \[3, 1, 5, 5\]"),
            ([1, 1, 0], "list"),
        ],
        ids=["added_to_scores", "by_pairs", "list"],
    )
    def test_what_cannot_be_read_as_a_mask_is_refused_with_the_remedy(self, mask, what):
        with pytest.raises(MisconfigurationException, match=rf"'attention_mask' is {what}; .*mask_key=None"):
            self.tokens_seen({"attention_mask": mask})

    @pytest.mark.parametrize(("rows", "length"), [(3, 3), (3, 6), (1, 11), (2, 7)])
    def test_a_router_that_sees_other_tokens_is_refused_with_the_remedy(self, rows, length):
        with pytest.raises(MisconfigurationException, match=rf"{rows * length} tokens .* \[3, 5\].*mask_key=None"):
            self.tokens_seen({"attention_mask": self.MASK}, rows, length)


class TestObserver:
    def test_the_choices_of_real_tokens_alone_are_counted(self):
        router = make_router()
        observer = observe(router)
        mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
        observer.open(mask=mask)
        chosen = router(torch.randn(12, D)).expert_TK.view(3, 4, 2)
        assert observer.take()[0].tolist() == torch.bincount(chosen[mask == 1].flatten(), minlength=6).tolist()

    def test_the_next_batch_without_a_mask_counts_whole(self):
        router = make_router()
        observer = observe(router)
        observer.open(mask=torch.zeros(2, 3, dtype=torch.int64))
        router(torch.randn(6, D))
        observer.close()
        observer.open()
        router(torch.randn(5, D))
        assert observer.take()[0].sum() == 10

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("last", [None, -1], ids=["all_tokens", "all_but_the_last"])
    def test_mtp_modules_count_the_positions_that_they_have_without_padding(self, side, last):
        model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", **TINY))
        observer = observe(model)
        sizes = []
        for rows in [padded(side), [{"input_ids": text} for text in texts()]]:
            for batch in DataLoader(rows, batch_size=len(rows) if "attention_mask" in rows[0] else 1):
                observer.open(mask=batch.get("attention_mask"))
                model(batch["input_ids"][:, :last], use_mtp=True)
            sizes.append([int(counts.sum()) // model.config.num_experts_per_tok for counts in observer.take()])
        assert sizes[0] == sizes[1]
        assert sizes[0][-2:] == [sum(n - k - (last is not None) for n in LENGTHS) for k in (1, 2)]

    def test_groups_and_padding_go_together(self):
        router = make_router()
        observer = RouterObserver(find_routers(router), num_groups=2)
        observer.attach()
        observer.start("cpu")
        observer.open(torch.tensor([1, 0, -1]), mask=torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1]]))
        router(torch.randn(9, D))
        assert observer.take()[0].sum(1).tolist() == [2, 4]

    def test_a_router_whose_tokens_go_through_the_sequence_first(self):
        class SequenceFirst(GateAdapter):
            sequence_first = True

        gate = Gate()
        observer = observe(gate, [SequenceFirst()])
        mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
        observer.open(mask=mask)
        _, chosen_SBK = gate(torch.randn(3, 2, D))
        expected = torch.bincount(chosen_SBK.transpose(0, 1)[mask == 1].flatten(), minlength=4)
        assert observer.take()[0].tolist() == expected.tolist()

    def test_no_host_waits_for_the_device(self):
        # Whoever reads a value of a meta tensor gets an error.
        gate = Gate().to("meta")
        observer = RouterObserver(find_routers(gate, [GateAdapter()]))
        observer.attach()
        observer.start("meta")
        observer.open(mask=torch.ones(2, 3, dtype=torch.int64, device="meta"))
        gate(torch.randn(6, D, device="meta"))
        assert observer.take()[0].shape == (4,)

    def test_a_compiled_router_uses_each_batchs_own_mask(self):
        model = nn.Sequential(nn.Linear(D, D), make_router())
        compiled = torch.compile(model, backend="aot_eager")
        observer = observe(compiled)
        for mask in ([[1, 1, 0]], [[0, 0, 1]], [[1, 1, 1]], None):
            observer.open(mask=None if mask is None else torch.tensor(mask))
            compiled(torch.randn(3, D)).gate_TK.sum().backward()
            observer.close()
            assert observer.take()[0].sum() == 2 * (3 if mask is None else sum(mask[0]))


def test_a_step_of_padding_alone_moves_nothing_and_goes_on():
    module = TinyMoE(lr=0.0)
    masks = torch.ones(8, 7, dtype=torch.int64)
    masks[2:4] = 0
    callback = AuxFreeBalanceCallback(RATE)
    trainer = make_trainer(callback)
    trainer.fit(module, data(8, attention_mask=masks))
    biases = [biases for _, _, biases in module.trace]
    assert biases[0] == biases[1] != biases[2]
    assert callback.tokens_seen == 6 * 7
