"""Documents that share a row: with the mask each is computed as if it were alone, from the data to the Trainer."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_fim import Documents, fim
from test_packing import EOS, documents_of_a_domain, table, with_separators
from tiny_run import balance, biases, differ, quiet_trainer, tiny_data, tiny_module
from torch import Tensor, nn

from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config, DeepSeekV3DataModule
from lightning_dsv3.balance import find_routers
from lightning_dsv3.config import load_run_config
from lightning_dsv3.data.loader import HeldOutBatches
from lightning_dsv3.data.packing import HeldOutWindows, TokenStream, TrainingWindows
from lightning_dsv3.ops.attention import Heads, Positions, causal_attention
from lightning_dsv3.ops.documents import Documents as RowDocuments
from lightning_dsv3.ops.documents import document_mask
from lightning_dsv3.parallel import checkpoint_blocks, compile_model

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 2,
    "initializer_range": 0.2,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 640},
    "full_query": {"q_lora_rank": None, "mtp_input_state": "pre_norm", "mtp_chain_state": "pre_norm"},
}
# Several documents to a row.
SHORT = {
    "prose": [f"song {n} of {n * n % 17}" for n in range(60)],
    "code": [f"x{n} = {n * n % 23}" for n in range(60)],
}
# RoPE turns in float32 whatever the model's dtype, and a document inside a row is turned by other angles than alone.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


def make_model(dtype: torch.dtype = torch.float32, **overrides: Any) -> DeepSeekV3:
    torch.manual_seed(0)
    model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", **(SHAPE | overrides)))
    for router in find_routers(model):
        nn.init.normal_(router.bias, std=0.1)
    return model.to(dtype)


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    borders = [0, *itertools.accumulate(lengths)]
    return list(itertools.pairwise(borders))


def numbers(*rows: list[int]) -> Tensor:
    """Document numbers of rows that are made of documents of these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def random_ids(document: Tensor, seed: int = 1) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], document.shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


rows_of_one_length = st.integers(2, 20).flatmap(
    lambda length: st.lists(
        st.sets(st.integers(1, length - 1)).map(lambda cuts: np.diff([0, *sorted(cuts), length]).tolist()),
        min_size=1, max_size=3,
    )
)  # fmt: skip


class TestModel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("options", OPTIONS)
    @given(rows=rows_of_one_length)
    def test_every_document_is_computed_as_if_it_were_alone(self, dtype: torch.dtype, options: str, rows: Any) -> None:
        model = make_model(dtype, **OPTIONS[options])
        document = numbers(*rows)
        ids = random_ids(document)
        with torch.no_grad():
            packed = model(ids, use_mtp=True, document=document)
            for row, lengths in enumerate(rows):
                for start, stop in spans(lengths):
                    alone = model(ids[row : row + 1, start:stop], use_mtp=True)
                    assert relative_error(packed.logits[row, start:stop], alone.logits[0]) < TOLERANCE[dtype]
                    # Alone, depth k has logits for the positions whose token i + k is there: those that do not cross.
                    for k, logits in enumerate(alone.mtp_logits, start=1):
                        ours = packed.mtp_logits[k - 1][row, start : stop - k]
                        assert relative_error(ours, logits[0]) < TOLERANCE[dtype]

    def test_without_the_mask_it_is_not(self) -> None:
        model, document = make_model(), numbers([7, 9])
        ids = random_ids(document)
        alone = model(ids[:, 7:], use_mtp=True)
        packed = model(ids, use_mtp=True)
        assert relative_error(packed.logits[:, 7:], alone.logits) > 0.05
        assert relative_error(packed.mtp_logits[0][:, 7:], alone.mtp_logits[0]) > 0.05

    def test_nothing_of_another_document_comes_through(self) -> None:
        """The same row with other neighbours: every operation of this document gets the same numbers."""
        model, document = make_model(torch.float64), numbers([6, 8, 5])
        ids = random_ids(document)
        others = torch.where(document == 1, ids, random_ids(document, seed=2))
        assert not torch.equal(ids, others)
        one, other = (model(x, use_mtp=True, document=document) for x in (ids, others))
        assert relative_error(one.logits[:, 6:14], other.logits[:, 6:14]) < 1e-12
        for k in (1, 2):
            a, b = one.mtp_logits[k - 1][:, 6:14], other.mtp_logits[k - 1][:, 6:14]
            assert relative_error(a[:, : 8 - k], b[:, : 8 - k]) < 1e-12
            # The last k positions do read tokens of the next document.
            assert relative_error(a[:, 8 - k :], b[:, 8 - k :]) > 0.05

    @pytest.mark.parametrize("normalizer", ["main", "own"])
    def test_mtp_is_not_trained_where_its_token_is_another_document_s(self, normalizer: str) -> None:
        model, document = make_model(mtp_loss_normalizer=normalizer), numbers([1, 5, 2, 6], [9, 5])
        ids = random_ids(document)
        labels = ids.clone()
        labels[1, 3:6] = -100
        output = model(ids, labels=labels, document=document)
        main_targets = int((labels[:, 1:] != -100).sum())
        for k, loss in enumerate(output.mtp_losses, start=1):
            terms = [
                F.cross_entropy(output.mtp_logits[k - 1][row, i], labels[row, i + k + 1])
                for row in range(2)
                for i in range(14 - k - 1)
                if document[row, i + k] == document[row, i] and labels[row, i + k + 1] != -100
            ]
            divisor = main_targets if normalizer == "main" else len(terms)
            torch.testing.assert_close(loss, torch.stack(terms).sum() / divisor)

    def test_main_loss_keeps_the_end_of_every_document(self) -> None:
        model, document = make_model(), numbers([7, 9])
        ids = random_ids(document)
        output = model(ids, labels=ids, document=document)
        expected = F.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(output.token_losses[0, :-1], expected)

    def test_gradients_are_the_sum_over_the_documents(self) -> None:
        model = make_model(torch.float64, rope_scaling=YARN, max_position_embeddings=640)
        lengths = [6, 1, 9, 4]
        document = numbers(lengths)
        ids = random_ids(document)

        def backward(ids: Tensor, **arguments: Any) -> None:
            output = model(ids, labels=ids, return_logits=False, **arguments)
            # As a sum over targets, so that the parts add up.
            ((output.loss + 0.3 * sum(output.mtp_losses)) * (ids.shape[1] - 1)).backward()

        def gradients() -> dict[str, Tensor]:
            taken = {name: parameter.grad for name, parameter in model.named_parameters()}
            model.zero_grad()
            return taken

        backward(ids, document=document)
        packed = gradients()
        for start, stop in spans(lengths):
            backward(ids[:, start : stop + 1])  # with what the document's last token predicts
        alone = gradients()
        backward(ids)
        without_mask = gradients()
        assert packed.keys() == alone.keys()
        for name, gradient in alone.items():
            assert relative_error(packed[name], gradient) < 1e-5, name
        changed = "blocks.0.attention.output.weight"
        assert relative_error(without_mask[changed], packed[changed]) > 0.05

    def test_one_document_in_a_row_is_the_model_without_a_mask(self) -> None:
        model, document = make_model(), numbers([15], [15])
        ids = random_ids(document)
        plain, masked = model(ids, labels=ids), model(ids, labels=ids, document=document)
        torch.testing.assert_close(masked.logits, plain.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(masked.loss, plain.loss)
        torch.testing.assert_close(masked.mtp_losses, plain.mtp_losses)

    @pytest.mark.parametrize("case", ["v3", "v3_yarn", "v2_groups"])
    def test_logits_equal_hugging_face_with_the_mask_written_out(self, case: str, tmp_path: Path) -> None:
        hf = pytest.importorskip("test_hf_parity", reason="needs the [hf] extra")
        config = DeepSeekV3Config(**hf.CASES[case])
        ours, theirs = hf.pair(config, tmp_path)
        document = numbers([5, 1, 12, 3], [14, 7])
        ids = torch.randint(0, config.vocab_size, document.shape)
        attended = torch.zeros(2, 1, 21, 21, dtype=torch.bool)
        for row, i, j in itertools.product(range(2), range(21), range(21)):
            attended[row, 0, i, j] = j <= i and document[row, i] == document[row, j]
        mask = torch.zeros(attended.shape).masked_fill(~attended, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits
            assert relative_error(ours(ids, document=document).logits, expected) < 1e-5
            assert relative_error(ours(ids).logits, expected) > 0.05


class TestOptions:
    @staticmethod
    def step(model: nn.Module) -> dict[str, Tensor]:
        document = numbers([4, 9, 6], [19])
        ids = random_ids(document)
        output = model(ids, labels=ids, document=document)
        model.zero_grad()
        (output.loss + 0.3 * sum(output.mtp_losses)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return gradients | {"logits": output.logits.detach(), "mtp": output.mtp_logits[-1].detach()}

    @pytest.mark.parametrize("policy", ["block", "keep_routing"])
    def test_checkpointing_is_bitwise_the_plain_model(self, policy: str) -> None:
        plain = make_model()
        changed = self.step(checkpoint_blocks(copy.deepcopy(plain), policy))
        for name, value in self.step(plain).items():
            assert torch.equal(changed[name], value), name

    @pytest.mark.parametrize(("part", "whole"), [("blocks", True), ("model", False)])
    def test_compiled_it_is_the_plain_model_and_a_block_has_no_graph_break(self, part: str, whole: bool) -> None:
        torch.compiler.reset()
        plain = make_model(num_nextn_predict_layers=1)
        changed = self.step(compile_model(copy.deepcopy(plain), part, backend="aot_eager", fullgraph=whole))
        torch.compiler.reset()
        for name, value in self.step(plain).items():
            torch.testing.assert_close(changed[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("autocast", [False, True])
    def test_all_blocks_keep_one_mask_in_the_dtype_of_attention(self, autocast: bool) -> None:
        """A boolean mask, or one of another dtype, would be turned into a tensor of this size in every block."""
        model, document = make_model(num_hidden_layers=3), numbers([100, 28])
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[2] == tensor.shape[3]:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            output = model(random_ids(document), use_mtp=True, document=document)
        (mask,) = kept.values()
        assert mask.dtype == output.logits.dtype == (torch.bfloat16 if autocast else torch.float32)


class TestAttention:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_rows_longer_than_a_kernel_s_tile_equal_the_plain_form(self, dtype: torch.dtype) -> None:
        """A tile of keys that is masked as a whole must give zeros and not 0 / 0."""
        lengths = [600, 37, 1, 462]
        q, k, v = wide = [torch.randn(1, 2, 1100, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        narrow = [x.detach().to(dtype).requires_grad_() for x in wide]
        documents = RowDocuments(numbers(lengths), document_mask(numbers(lengths), dtype))
        out = causal_attention(Heads(*narrow), scale=0.3, v_head_dim=6, documents=documents)
        plain = torch.cat(
            [
                (
                    (q[:, :, a:b] @ k[:, :, a:b].mT * 0.3)
                    .masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), float("-inf"))
                    .softmax(-1)
                )
                @ v[:, :, a:b, :6]
                for a, b in spans(lengths)
            ],
            dim=2,
        )
        out.double().square().sum().backward()
        plain.square().sum().backward()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert relative_error(out.double(), plain) < tolerance
        for mine, theirs in zip(narrow, wide, strict=True):
            assert relative_error(mine.grad.double(), theirs.grad) < tolerance

    def test_the_first_positions_have_their_part_of_everything(self) -> None:
        cos, documents = torch.randn(5, 2), RowDocuments.prepared(numbers([2, 3]), "sdpa", torch.float32)
        first = Positions(cos, -cos, documents).first(3)
        assert torch.equal(first.cos, cos[:3])
        assert torch.equal(first.sin, -cos[:3])
        assert torch.equal(first.documents.number_BS, numbers([2, 1]))
        assert torch.equal(first.documents.mask, document_mask(numbers([2, 1]), torch.float32))
        assert Positions(cos, -cos).first(3).documents is None


class TestPacking:
    @given(documents=documents_of_a_domain, data=st.data())
    def test_any_stretch_of_a_stream_is_numbered(self, documents: Any, data: Any) -> None:
        order = data.draw(st.permutations(range(len(documents))))
        stream = TokenStream(table(documents), np.array(order))
        whole = [n for n, place in enumerate(order) for _ in range(1 + len(documents[place]))]
        whole += [len(documents)] * 5
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        assert stream.document_numbers(start, stop).tolist() == whole[start:stop]

    @given(documents=documents_of_a_domain, length=st.integers(2, 9))
    def test_held_out_windows_count_from_their_first_position(self, documents: Any, length: int) -> None:
        """Many windows begin inside a document; the last one ends in padding."""
        windows = HeldOutWindows(table(documents), length)
        stream = np.cumsum(np.array(with_separators(documents)) == EOS)
        stream = np.concatenate([stream, np.full(length, len(documents) + 1)])
        for index in range(len(windows)):
            expected = stream[index * (length - 1) :][:length]
            assert windows.document_numbers(index).tolist() == (expected - expected[0]).tolist()

    def test_a_document_without_text_is_one_of_its_own(self) -> None:
        windows = HeldOutWindows(table([[5, 6], [], [7]]), 8)
        assert windows[0][0].tolist() == [EOS, 5, 6, EOS, EOS, 7, EOS, EOS]
        assert windows.document_numbers(0).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]

    @pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("length", [2, 8, 400])
    def test_training_windows_are_numbered_over_epochs_and_rearranged_documents(self, rate: float, length: int) -> None:
        """In a text without end-of-sentences these are the borders; 400 positions are more than two epochs."""
        documents = Documents([1, 2, 3, 5, 8, 40, 1, 17, 2, 63])
        windows = TrainingWindows(documents, length, seed=0, domain="a", fim=fim(rate))
        for index in range(60):
            borders = np.cumsum(windows[index] == EOS)
            assert windows.document_numbers(index).tolist() == (borders - borders[0]).tolist()

    def test_an_end_of_sentence_inside_a_text_is_no_border(self) -> None:
        windows = TrainingWindows(table([[5, EOS, 6]]), 8, seed=0, domain="a")
        assert windows.in_stream(0).tolist() == [EOS, 5, EOS, 6, EOS, 5, EOS, 6]
        assert TokenStream(table([[5, EOS, 6]]), np.array([0])).document_numbers(0, 4).tolist() == [0] * 4
        assert windows.document_numbers(0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


class TestDataModule:
    FIM_TEXTS = tuple(f"number {n} is {n * n} <｜end▁of▁sentence｜> and so on" for n in range(60))

    def make(self, config: dict[str, Any], **arguments: Any) -> DeepSeekV3DataModule:
        data = tiny_data(config={"val_windows": 0} | config, **({"documents": SHORT} | arguments))
        data.setup()
        return data

    def test_every_batch_has_it_with_fill_in_the_middle_and_held_out(self) -> None:
        data = self.make(
            {"document_mask": True, "fim_rate": 0.5}, vocab_size=129_280, sequence_length=40,
            documents={"a": self.FIM_TEXTS},
        )  # fmt: skip
        training = list(itertools.islice(data.train_dataloader(), 12))
        held_out = [*data.val_dataloader(), *data.test_dataloader(), *data.predict_dataloader()]
        for batch in training:
            assert batch["document"].dtype == torch.int64
            borders = (batch["input_ids"] == EOS).cumsum(1)
            assert torch.equal(batch["document"], borders - borders[:, :1])
        padded = 0
        for batch in held_out:
            assert batch["document"].dtype == torch.int64
            borders = (batch["input_ids"] == EOS).cumsum(1)
            padding = batch["labels"] == -100
            padded += int(padding.sum())
            assert torch.equal(batch["document"][~padding], (borders - borders[:, :1])[~padding])
            # Padding is of the document that the end-of-sentence before it begins.
            assert torch.equal(batch["document"][:, 1:][padding[:, 1:]], batch["document"][:, :-1][padding[:, 1:]])
        assert padded > 0
        mid_document = [bool((batch["input_ids"][:, 0] != EOS).any()) for batch in training + held_out]
        assert any(mid_document)
        assert any(int(batch["document"].max()) > 1 for batch in held_out)

    def test_it_is_off_by_default_and_changes_nothing_else(self) -> None:
        off, on = self.make({}), self.make({"document_mask": True})
        pairs = zip(
            [*itertools.islice(off.train_dataloader(), 5), *off.val_dataloader(), *off.test_dataloader()],
            [*itertools.islice(on.train_dataloader(), 5), *on.val_dataloader(), *on.test_dataloader()],
            strict=True,
        )
        for without, batch in pairs:
            assert set(batch) - set(without) == {"document"}
            for name, value in without.items():
                assert torch.equal(batch[name], value)
        assert off.heldout_bytes("prose") == on.heldout_bytes("prose")

    def test_a_rank_s_empty_row_has_one_too(self) -> None:
        windows = [HeldOutWindows(table([[5, 6, 7]]), 8)]
        batch = HeldOutBatches(windows, rows=2, rank=1, world_size=2, with_documents=True)[0]
        assert batch["document"].tolist() == [[0] * 8]
        assert (batch["labels"] == -100).all()

    def test_a_run_goes_on_with_the_other_value_and_the_same_samples(self) -> None:
        without, mask = self.make({}).train_dataloader(), self.make({"document_mask": True}).train_dataloader()
        seen = iter(without)
        for _ in range(3):
            next(seen)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mask.load_state_dict(without.state_dict())
        after = next(iter(mask))
        assert torch.equal(after["input_ids"], next(seen)["input_ids"])
        assert "document" in after

    def test_workers_make_it_as_well(self) -> None:
        plain = self.make({"document_mask": True}).train_dataloader()
        workers = self.make({"document_mask": True, "num_workers": 2}).train_dataloader()
        for one, other in itertools.islice(zip(plain, workers, strict=False), 4):
            assert torch.equal(one["document"], other["document"])
            assert one["document"].any()


class TestRun:
    def test_the_option_goes_through_the_configuration_and_back(self, tmp_path: Path) -> None:
        config = load_run_config(["data.document_mask=true"])
        assert config.data.document_mask is True
        assert load_run_config([]).data.document_mask is False
        (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert load_run_config([f"config={tmp_path / 'config.yaml'}"]) == config
        assert DeepSeekV3DataModule(config.data, documents=SHORT).config.document_mask

    def test_training_validation_test_and_prediction_are_given_it(self) -> None:
        module = tiny_module()
        data = tiny_data(config={"document_mask": True, "val_windows": 4}, documents=SHORT)
        trainer = quiet_trainer(balance(), max_steps=2, val_check_interval=1, check_val_every_n_epoch=None)
        given: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

        def note(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
            given.setdefault(str(trainer.state.stage), []).append((args[0], kwargs.get("document")))

        module.model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        predictions = trainer.predict(module, data)
        assert len(given) == 4
        for stage, calls in given.items():
            for ids, document in calls:
                assert document is not None, stage
                assert document.shape == ids.shape
                begins = document.diff(dim=1) > 0
                assert begins.any(), stage
                assert (ids[:, 1:][begins] == EOS).all()
        assert any(bias.any() for bias in biases(module).values())
        batch = next(iter(data.predict_dataloader()))
        with torch.no_grad():
            output = module.model(batch["input_ids"], labels=batch["labels"], document=batch["document"])
            without = module.model(batch["input_ids"], labels=batch["labels"])
        torch.testing.assert_close(predictions[0]["token_losses"], output.token_losses, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(predictions[0]["token_losses"], without.token_losses, rtol=1e-4, atol=1e-5)

    def test_a_step_with_the_mask_learns_otherwise_than_one_without(self) -> None:
        trained = []
        for config in ({}, {"document_mask": True}, {"document_mask": True}):
            module = tiny_module()
            quiet_trainer(balance(), max_steps=2).fit(module, tiny_data(config=config, documents=SHORT))
            trained.append(module.state_dict())
        assert differ(trained[0], trained[1])
        assert not differ(trained[1], trained[2])

    def test_validation_is_of_the_masked_model(self) -> None:
        module, data = tiny_module(), tiny_data(config={"document_mask": True}, documents=SHORT)
        trainer = quiet_trainer(max_steps=1)
        (logged,) = trainer.validate(module, data, verbose=False)
        total = count = 0.0
        for batch in data.val_dataloader():
            with torch.no_grad():
                losses = module.model(batch["input_ids"], batch["labels"], document=batch["document"]).token_losses
            total, count = total + float(losses.sum()), count + int((batch["labels"][:, 1:] != -100).sum())
        assert logged["val/loss"] == pytest.approx(total / count, rel=1e-4)
