"""Acceptance of MTP's drafts, against loops over positions with all logits in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import pytorch_lightning
import torch
from ranks import run_on_ranks
from tiny_run import SHAPE, quiet_trainer, tiny_data, tiny_module
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_dsv3
import lightning_dsv3.pytorch_lightning
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.metrics import MTPAcceptance
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.ops.acceptance import (
    break_even_acceptance,
    chain_counts,
    draft_agreement,
    length_counts,
    teacher_forced_acceptance,
    tokens_per_pass,
)

VOCAB = 61
CHUNK = 8  # rows of a chunk


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dsv3.ops.cross_entropy._CHUNK_ELEMENTS", VOCAB * CHUNK)


def first_largest(values: list[float]) -> int:
    return values.index(max(values))


def accepted_by_sampling(main_logits: Tensor, draft_logits: Tensor) -> float:
    """Speculative sampling: a token x drawn from q is accepted with probability min(1, p(x) / q(x))."""
    p, q = torch.softmax(main_logits.double(), 0).tolist(), torch.softmax(draft_logits.double(), 0).tolist()
    return sum(q_x * min(1.0, p_x / q_x) for p_x, q_x in zip(p, q, strict=True))


def rates_by_hand(
    main: Tensor, drafts: tuple[Tensor, ...], labels: Tensor, document: Tensor | None
) -> dict[str, list[float]]:
    """Walk over rows, positions and depths; main ``[B, S, V]``, drafts of depth k ``[B, S - k, V]``."""
    depths = len(drafts)
    tried, kept = [[0.0] * depths for _ in range(3)], [[0.0] * depths for _ in range(3)]
    for row, i in product(range(main.shape[0]), range(main.shape[1])):
        reached = [1.0, 1.0]  # greedy, sampled
        for k in range(1, depths + 1):
            has_label = i + k + 1 < main.shape[1] and int(labels[row, i + k + 1]) != -100
            if has_label and document is not None and document[row, i] != document[row, i + k]:
                has_label = False
            if not has_label:
                reached = [0.0, 0.0]
                continue
            same = first_largest(main[row, i + k].tolist()) == first_largest(drafts[k - 1][row, i].tolist())
            overlap = accepted_by_sampling(main[row, i + k], drafts[k - 1][row, i])
            for kind, accepted in enumerate((float(same), overlap)):
                tried[kind][k - 1] += reached[kind]
                reached[kind] *= accepted
                kept[kind][k - 1] += reached[kind]
            tried[2][k - 1] += 1
            kept[2][k - 1] += float(same)
    rates = [[a / n if n else math.nan for a, n in zip(*pair, strict=True)] for pair in zip(kept, tried, strict=True)]
    return dict(zip(("greedy", "sampled", "alone"), rates, strict=True))


class TestAgreement:
    @pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, 63])
    def test_is_that_of_all_logits_at_every_chunk_border(self, rows: int, small_chunks: None) -> None:
        weight, main = torch.randn(VOCAB, 16), torch.randn(rows, 16)
        draft = main + 0.7 * torch.randn(rows, 16)
        agreement = draft_agreement(main, draft, weight)
        p, q = main.double() @ weight.double().T, draft.double() @ weight.double().T
        same = [first_largest(a) == first_largest(b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
        assert agreement.greedy.tolist() == same
        assert rows == 1 or 0 < sum(same) < rows
        overlap = [accepted_by_sampling(a, b) for a, b in zip(p, q, strict=True)]
        assert agreement.overlap.dtype == torch.float32
        assert agreement.overlap.tolist() == pytest.approx(overlap, rel=1e-5)

    def test_the_first_of_equally_likely_tokens_counts(self, small_chunks: None) -> None:
        weight = torch.zeros(VOCAB, 2)
        weight[[3, 40], 0] = 1.0
        weight[40, 1] = 0.5
        main = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        draft = torch.tensor([[2.0, 0.0], [2.0, 2.0]])
        assert draft_agreement(main, draft, weight).greedy.tolist() == [True, False]

    def test_a_state_agrees_with_itself_and_with_no_certain_other(self) -> None:
        weight, states = torch.randn(500, 16), torch.randn(33, 16)
        greedy, overlap = draft_agreement(states, states, weight)
        assert greedy.all()
        assert overlap.max() <= 1.0
        torch.testing.assert_close(overlap, torch.ones(33), rtol=0, atol=1e-5)
        certain = 1000 * torch.eye(16)
        greedy, overlap = draft_agreement(certain, certain.roll(1, 0), torch.eye(16))
        assert not greedy.any()
        assert (overlap == 0).all()

    def test_autocast_compares_the_logits_that_the_model_has_under_it(self) -> None:
        head, main = nn.Linear(16, VOCAB, bias=False), torch.randn(200, 16)
        draft = main + 0.05 * torch.randn(200, 16)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            greedy, overlap = draft_agreement(main, draft, head.weight)
            p, q = head(main), head(draft)
            same = p.max(-1).indices == q.max(-1).indices
        assert p.dtype == torch.bfloat16
        assert overlap.dtype == torch.float32
        assert torch.equal(greedy, same)
        expected = [accepted_by_sampling(a, b) for a, b in zip(p, q, strict=True)]
        assert overlap.tolist() == pytest.approx(expected, rel=1e-5)

    def test_no_rows_are_no_error(self) -> None:
        greedy, overlap = draft_agreement(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(9, 4))
        assert greedy.shape == overlap.shape == (0,)

    def test_no_logits_of_all_positions_are_ever_made(self, small_chunks: None) -> None:
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                largest = max([largest, *(t.numel() for t in (out if isinstance(out, tuple) else [out]))])
                return out

        main, draft, weight = torch.randn(63, 4), torch.randn(63, 4), torch.randn(VOCAB, 4, requires_grad=True)
        with Watch():
            agreement = draft_agreement(main, draft, weight)
        assert largest == VOCAB * CHUNK
        assert not agreement.overlap.requires_grad


def text_with_borders(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels with holes and one row without any, and documents of which some are as short as one token."""
    ids = torch.randint(0, VOCAB, (rows, length))
    labels = ids.masked_fill(torch.rand(rows, length) < 0.15, -100)
    labels[-1] = -100
    document = (torch.rand(rows, length) < 0.3).long().cumsum(dim=1)
    return ids, labels, document


def agreeing_model(depths: int) -> DeepSeekV3:
    """A model that says again what it reads; its modules waver between that and what was read before."""
    config = DeepSeekV3Config.from_preset(
        "tiny", **SHAPE | {"vocab_size": VOCAB, "num_nextn_predict_layers": depths, "tie_word_embeddings": True}
    )
    model = DeepSeekV3(config).eval()
    nn.init.normal_(model.embedding.weight, std=0.3)
    for module in model.mtp:
        module.projection.weight.data = torch.cat([torch.eye(32), torch.eye(32)], dim=1)
    return model


class TestTeacherForced:
    @pytest.mark.parametrize("with_documents", [False, True])
    @pytest.mark.parametrize("depths", [1, 2, 3])
    def test_rates_are_those_of_a_walk_over_positions(
        self, depths: int, with_documents: bool, small_chunks: None
    ) -> None:
        model = agreeing_model(depths)
        ids, labels, document = text_with_borders(rows=13, length=17)
        documents = document if with_documents else None
        with torch.no_grad():
            output = model(ids, labels=labels, document=documents)
        expected = rates_by_hand(output.logits, output.mtp_logits, labels, documents)
        acceptance = teacher_forced_acceptance(output.hidden, output.mtp_hidden, model.head.weight, labels, documents)
        greedy, sampled, alone = MTPAcceptance(depths), MTPAcceptance(depths), MTPAcceptance(depths, conditional=False)
        greedy.update(*chain_counts(acceptance.greedy, acceptance.counted))
        sampled.update(*chain_counts(acceptance.sampled, acceptance.counted))
        alone.update(acceptance.counted.sum((1, 2)), acceptance.greedy.sum((1, 2)))
        for kind, metric in {"greedy": greedy, "sampled": sampled, "alone": alone}.items():
            assert metric.compute().flatten().tolist() == pytest.approx(expected[kind], rel=1e-5), kind
        # The cases differ, and in none is everything or nothing accepted.
        assert all(0 < rate < 1 for kind in ("greedy", "sampled") for rate in expected[kind])
        if depths > 1:
            assert expected["alone"][1] != pytest.approx(expected["greedy"][1])

    def test_drafts_are_counted_where_they_have_a_loss(self) -> None:
        model = agreeing_model(2)
        ids, labels, document = text_with_borders(rows=4, length=17)
        output = model(ids, labels=labels, document=document)
        counted = teacher_forced_acceptance(
            output.hidden, output.mtp_hidden, model.head.weight, labels, document
        ).counted
        total = (labels[:, 1:] != -100).sum()
        for k in (1, 2):
            log_p = output.mtp_logits[k - 1].log_softmax(-1)[:, :-1].gather(-1, ids[:, k + 1 :, None]).squeeze(-1)
            loss = -log_p[counted[k - 1, :, : 17 - k - 1]].sum() / total
            torch.testing.assert_close(output.mtp_losses[k - 1], loss)

    def test_row_too_short_for_the_second_module(self) -> None:
        model = agreeing_model(2)
        ids = torch.tensor([[5, 7]])
        output = model(ids, labels=ids)
        acceptance = teacher_forced_acceptance(output.hidden, output.mtp_hidden, model.head.weight, ids)
        assert acceptance.counted.shape == (1, 1, 2)
        assert not acceptance.counted.any()


class TestCounts:
    def test_lengths_say_what_was_tried_and_what_was_kept(self) -> None:
        torch.manual_seed(1)
        drafted = torch.randint(0, 5, (200,))
        accepted = (torch.rand(200) * (drafted + 1)).long()
        tried, kept = length_counts(accepted, drafted, num_drafts=4)
        pairs = list(zip(accepted.tolist(), drafted.tolist(), strict=True))
        assert tried.tolist() == [sum(d >= k and a >= k - 1 for a, d in pairs) for k in range(1, 5)]
        assert kept.tolist() == [sum(a >= k for a, _ in pairs) for k in range(1, 5)]

    def test_nothing_is_tried_behind_a_draft_that_does_not_exist(self) -> None:
        counted = torch.tensor([[True, False], [True, True], [False, True]])
        tried, kept = chain_counts(torch.full((3, 2), 0.5), counted)
        assert (tried.tolist(), kept.tolist()) == ([1.0, 0.5, 0.0], [0.5, 0.25, 0.0])

    @pytest.mark.parametrize(("accepted", "drafted"), [([3], 2), ([-1], 2), ([1], 5)])
    def test_impossible_lengths_are_refused(self, accepted: list[int], drafted: int) -> None:
        with pytest.raises(ValueError, match="without the token that the main model adds"):
            length_counts(torch.tensor(accepted), drafted, num_drafts=4)

    def test_tokens_per_pass_are_those_of_steps_drawn_with_these_rates(self) -> None:
        rates = [0.9, 0.5, 0.7]
        expected = 0.0
        for draws in product((0, 1), repeat=3):
            chance = math.prod(a if draw else 1 - a for a, draw in zip(rates, draws, strict=True))
            kept = next((k for k, draw in enumerate(draws) if not draw), 3)
            expected += chance * (kept + 1)
        assert tokens_per_pass(rates).item() == pytest.approx(expected, rel=1e-12)
        assert tokens_per_pass(torch.tensor(0.85)).item() == pytest.approx(1.85)

    def test_tokens_per_pass_of_what_nobody_tried(self) -> None:
        assert tokens_per_pass([0.5, 0.0, math.nan]).item() == 1.5
        assert tokens_per_pass([0.5, math.nan]).isnan()

    @pytest.mark.parametrize(("verify", "draft"), [(1.0, 0.0), (1.25, 0.125), (1.9, 0.5)])
    def test_at_break_even_both_ways_are_equally_fast(self, verify: float, draft: float) -> None:
        a = break_even_acceptance(verify, draft)
        assert tokens_per_pass([a]).item() / (verify + draft) == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("costs", "name"),
        [((0.0, 0.1), "cost_ratio_verify"), ((math.nan, 0.1), "cost_ratio_verify"), ((1, -1), "draft")],
    )
    def test_impossible_costs_are_named(self, costs: tuple[float, float], name: str) -> None:
        with pytest.raises(ValueError, match=name):
            break_even_acceptance(*costs)


class TestMetric:
    def test_adds_up_and_starts_again_after_reset(self) -> None:
        metric = MTPAcceptance(num_drafts=3)
        metric.update(torch.tensor([10, 8]), torch.tensor([8, 2]))  # a step with fewer drafts
        metric.update(torch.tensor([10, 4, 4]), torch.tensor([4, 4, 1]))
        assert metric.compute().tolist() == [0.6, 0.5, 0.25]
        metric.reset()
        metric.update(torch.tensor([2]), torch.tensor([1]))
        assert metric.compute()[0] == 0.5
        assert metric.compute()[1:].isnan().all()

    @pytest.mark.filterwarnings("ignore:.*before the ``update`` method")
    def test_is_nan_before_any_draft(self) -> None:
        assert MTPAcceptance(num_drafts=2).compute().isnan().tolist() == [True, True]

    def test_large_counts_stay_exact(self) -> None:
        metric = MTPAcceptance(num_drafts=1)
        metric.update(torch.tensor([2**40]), torch.tensor([2**40]))
        metric.update(torch.tensor([1]), torch.tensor([0]))
        assert (metric.num_drafted.item(), metric.num_accepted.item()) == (2**40 + 1, 2**40)

    def test_all_drafts_counted_as_tried_are_refused(self) -> None:
        """A decoder that gives its drafts made, and not those tried, would get the product of the rates."""
        metric, alone = MTPAcceptance(num_drafts=2), MTPAcceptance(num_drafts=2, conditional=False)
        for each in (metric, alone):
            each.update(torch.tensor([10, 10]), torch.tensor([8, 6]))
        with pytest.raises(ValueError, match=r"num_drafted=\[10.0, 10.0\].*behind accepted ones only.*length_counts"):
            metric.compute()
        assert alone.compute().tolist() == [0.8, 0.6]
        alone.update(torch.tensor([1, 1]), torch.tensor([4, 1]))
        with pytest.raises(ValueError, match="must be among the drafted; `length_counts`"):
            alone.compute()

    def test_a_model_that_is_nan_is_no_wrong_count(self) -> None:
        metric = MTPAcceptance(num_drafts=2)
        acceptance = torch.tensor([[math.nan, 0.5], [0.5, 0.5]])
        metric.update(*chain_counts(acceptance, torch.ones(2, 2, dtype=torch.bool)))
        assert metric.compute().isnan().all()

    @pytest.mark.parametrize("shapes", [((3,), (3,)), ((2,), (1,)), ((1, 2), (1, 2))])
    def test_other_shapes_are_refused(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        with pytest.raises(ValueError, match=r"num_drafted has shape .* num_drafts=2"):
            MTPAcceptance(num_drafts=2).update(*(torch.ones(shape) for shape in shapes))

    def test_no_positions_are_refused(self) -> None:
        with pytest.raises(ValueError, match="num_drafts=0"):
            MTPAcceptance(num_drafts=0)


BATCHES = 5


class Stream(IterableDataset):
    """Batches that are made already."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    keys = ("input_ids", "labels", "document")
    return [dict(zip(keys, text_with_borders(3, 15), strict=True)) for _ in range(BATCHES)]


def module_of(depths: int) -> Any:
    torch.manual_seed(0)
    model = agreeing_model(depths)
    module = lightning_dsv3.DeepSeekV3Module(model.config)
    module.model.load_state_dict(model.state_dict())
    return module


def logged(mine: list[dict[str, Tensor]], **arguments: Any) -> dict[str, float]:
    """Validate on these batches."""
    trainer = quiet_trainer(use_distributed_sampler=False, **arguments)
    trainer.validate(module_of(2), DataLoader(Stream(mine), batch_size=None), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if "acceptance" in name}


def logged_on_rank() -> tuple[dict[str, float], dict[str, float], list[float]]:
    """Validate with 3 and 2 batches, and with all of them on rank 0, for which rank 1 has rows that count for nothing;
    then with a metric that never had an update on rank 1."""
    rank = int(os.environ["RANK"])
    fillers = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    uneven = logged([batches()[:3], batches()[3:]][rank], devices=2, strategy="ddp")
    filled = logged([batches(), fillers][rank], devices=2, strategy="ddp")
    metric = MTPAcceptance(num_drafts=2)
    if rank == 0:
        metric.update(torch.tensor([4, 2]), torch.tensor([2, 1]))
    return uneven, filled, metric.compute().tolist()


class TestValidation:
    def test_logs_the_rates_of_all_batches_together(self) -> None:
        model = module_of(2).model
        whole = {key: torch.cat([batch[key] for batch in batches()]) for key in batches()[0]}
        with torch.no_grad():
            output = model.eval()(whole["input_ids"], labels=whole["labels"], document=whole["document"])
        rates = rates_by_hand(output.logits, output.mtp_logits, whole["labels"], whole["document"])
        assert logged(batches()) == pytest.approx(
            {
                "val/mtp_acceptance/1": rates["greedy"][0],
                "val/mtp_acceptance/2": rates["greedy"][1],
                "val/mtp_acceptance_sampled/1": rates["sampled"][0],
                "val/mtp_acceptance_sampled/2": rates["sampled"][1],
                "val/mtp_acceptance_alone/2": rates["alone"][1],
            },
            rel=1e-5,
        )

    @pytest.mark.distributed
    def test_two_ranks_equal_one(self) -> None:
        expected = logged(batches())
        for uneven, filled, of_metric in run_on_ranks(2, logged_on_rank):
            assert uneven == pytest.approx(expected, rel=1e-6)
            assert filled == pytest.approx(expected, rel=1e-6)
            assert of_metric == [0.5, 0.5]

    def test_a_run_logs_them_at_every_validation_and_both_packages_the_same(self) -> None:
        seen = []
        for package, trainer_class in (
            (lightning_dsv3, None),
            (lightning_dsv3.pytorch_lightning, pytorch_lightning.Trainer),
        ):
            trainer = quiet_trainer(
                **({"trainer_class": trainer_class} if trainer_class else {}), max_steps=2, val_check_interval=2,
                precision="bf16-mixed",
            )  # fmt: skip
            module, data = tiny_module(package, balance=["sequence"]), tiny_data(package)
            trainer.fit(module, data)
            fitted = {name: v.item() for name, v in trainer.callback_metrics.items() if "acceptance" in name}
            (tested,) = trainer.test(module, data, verbose=False)
            seen.append((fitted, {name: value for name, value in tested.items() if "acceptance" in name}))
            assert fitted.keys() == {"val/mtp_acceptance/1", "val/mtp_acceptance_sampled/1"}
            assert seen[-1][1].keys() == {"test/mtp_acceptance/1", "test/mtp_acceptance_sampled/1"}
            assert all(0 < value <= 1 for stage in seen[-1] for value in stage.values())
        assert seen[0] == seen[1]

    def test_a_model_without_mtp_logs_none(self) -> None:
        (measured,) = quiet_trainer().validate(
            module_of(0), DataLoader(Stream(batches()), batch_size=None), verbose=False
        )
        assert measured.keys() == {"val/loss"}
