"""The engine: whatever texts have in common, each gets what the model says of it alone, and no token is run twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from lightning_dsv3.evaluation import engine as engine_module
from lightning_dsv3.evaluation.engine import Engine
from lightning_dsv3.evaluation.prefix_tree import count_inputs, path, prefix_tree, walk, without_short_runs
from lightning_dsv3.inference import Decoder, Sampling

# Few tokens, so that much is shared, and what begins alike does not end alike.
texts = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model():
    return tiny_model(std=0.12)


def unique_prefixes(sequences):
    return {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence))}


class TestTree:
    @given(sequences=texts)
    def test_every_sequence_is_the_path_to_the_node_that_it_ends_in(self, sequences):
        ends = {}
        for node in walk(prefix_tree(sequences)):
            assert len({child.tokens[0] for child in node.children}) == len(node.children)
            assert len(node.children) != 1 or node.ends
            for number in node.ends:
                ends[number] = [token for part in path(node) for token in part.tokens]
        assert [ends[number] for number in range(len(sequences))] == sequences

    @given(sequences=texts)
    def test_its_inputs_are_the_different_beginnings(self, sequences):
        assert count_inputs(prefix_tree(sequences)) == len(unique_prefixes(sequences))


def plain_scores(model, sequence):
    with torch.no_grad():
        logprobs = model(torch.tensor([sequence[:-1]])).logits[0].log_softmax(-1)
    targets = torch.tensor(sequence[1:])
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1).numpy(), (logprobs.argmax(-1) == targets).numpy()


class TestScoring:
    @settings(max_examples=40, deadline=None)
    @given(
        sequences=texts,
        rows=st.one_of(st.none(), st.integers(1, 4)),
        tokens=st.integers(1, 40),
        shared=st.sampled_from([1, 3, 16]),
    )
    def test_scores_are_those_of_each_sequence_alone(self, model, sequences, rows, tokens, shared):
        engine = Engine(model, max_rows=rows, max_tokens=tokens, min_shared=shared)
        scores = dict(engine.score(sequences))
        assert sorted(scores) == list(range(len(sequences)))
        for number, sequence in enumerate(sequences):
            logprobs, greedy = plain_scores(model, sequence)
            np.testing.assert_allclose(scores[number].logprobs, logprobs, atol=1e-5)
            assert scores[number].greedy.tolist() == greedy.tolist()
        assert engine.counts.asked == sum(len(sequence) - 1 for sequence in sequences)
        assert engine.counts.unique == len(unique_prefixes(sequences))
        if shared == 1:
            assert engine.counts.computed == engine.counts.unique
        assert engine.counts.computed <= engine.counts.asked

    @settings(max_examples=30, deadline=None)
    @given(sequences=texts, data=st.data())
    def test_only_what_is_asked_for_is_scored(self, model, sequences, data):
        first = [data.draw(st.integers(1, len(sequence) - 1)) for sequence in sequences]
        for number, scored in Engine(model).score(sequences, first):
            logprobs, _ = plain_scores(model, sequences[number])
            np.testing.assert_allclose(scored.logprobs[first[number] - 1 :], logprobs[first[number] - 1 :], atol=1e-5)

    def test_letters_of_one_question_cost_one_pass(self, model, monkeypatch):
        passes = []
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda ids, **k: passes.append(ids.shape) or forward(ids, **k))
        question = [5, 6, 7, 8, 9]
        scores = dict(Engine(model).score([[*question, letter] for letter in (1, 2, 3, 4)], [5] * 4))
        assert passes == [(1, 5)]
        assert len({round(float(scored.logprobs[-1]), 6) for scored in scores.values()}) == 4

    def test_what_is_known_comes_before_all_is_done(self, model):
        first = next(Engine(model, max_rows=1).score([[1, 2, 3], [4, 5, 6], [7, 8]]))
        assert first[0] == 0

    def test_logits_in_pieces_are_the_same(self, model, monkeypatch):
        sequences = torch.randint(0, 64, (5, 20), generator=torch.Generator().manual_seed(0)).tolist()
        expected = dict(Engine(model).score(sequences))
        monkeypatch.setitem(engine_module._MOST_LOGITS, "cpu", 64 * 7)
        for number, scored in Engine(model).score(sequences):
            np.testing.assert_allclose(scored.logprobs, expected[number].logprobs, atol=1e-6)

    def test_rows_of_very_different_lengths_are_not_padded_to_the_longest(self, model):
        generator = torch.Generator().manual_seed(0)
        lengths = (400, 390, *range(16, 6, -1))
        sequences = [
            [n, *torch.randint(0, 64, (size - 1,), generator=generator).tolist()] for n, size in enumerate(lengths)
        ]
        engine = Engine(model)

        def batches():
            made = engine._batches([(n, 0) for n in prefix_tree(sequences)])
            return sorted(sorted(len(node.tokens) for node, _ in batch) for batch in made)

        # On a CPU attention is not padded; elsewhere all of it is.
        assert batches() == [[7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 390, 400]]
        engine._most_padded = 1.3
        assert batches() == [[7, 8, 9, 10, 11, 12, 13, 14], [15, 16, 390, 400]]

    def test_a_begin_of_sentence_in_common_is_no_prefix(self, model):
        engine = Engine(model)
        dict(engine.score([[0, *range(20, 60)], [0, *range(3, 40)]]))
        assert engine.counts.computed == engine.counts.unique + 1


class TestGenerating:
    @settings(max_examples=30, deadline=None)
    @given(prompts=texts, rows=st.integers(1, 5), eos=st.integers(0, 63), sample=st.booleans())
    def test_continuations_are_those_of_each_prompt_alone(self, model, prompts, rows, eos, sample):
        seeds = list(range(len(prompts)))
        options = {"max_new_tokens": 6, "eos_token_ids": [eos], "sampling": Sampling(0.9) if sample else None}
        made = dict(Engine(model, max_rows=rows).generate(prompts, seeds=seeds, **options))
        assert sorted(made) == seeds
        for number, prompt in enumerate(prompts):
            new = [t for r in Decoder(model, [prompt], seeds=[number], **options) for news in r for t in news.tokens]
            assert made[number] == new

    def test_drafts_change_nothing(self, model):
        prompts = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4], [7]]
        plain = dict(Engine(model).generate(prompts, max_new_tokens=9))
        assert dict(Engine(model, max_rows=2).generate(prompts, max_new_tokens=9, num_drafts=2)) == plain

    def test_prefixes_are_run_once(self, model):
        shared = list(range(20))
        prompts = [[*shared, *rest] for rest in ([1, 2], [3, 4, 5], [6])]
        engine = Engine(model)
        dict(engine.generate(prompts, max_new_tokens=3))
        assert (engine.counts.asked, engine.counts.unique, engine.counts.computed) == (66, 26, 26)


class TestShortRuns:
    @given(sequences=texts, least=st.integers(1, 6), most=st.integers(0, 12))
    def test_sequences_stay_and_no_more_is_repeated_than_allowed(self, sequences, least, most):
        roots = prefix_tree(sequences)
        before = count_inputs(roots)
        roots = without_short_runs(roots, least, most)
        assert before <= count_inputs(roots) <= before + most
        ends = {}
        for node in walk(roots):
            assert node.depth == sum(len(part.tokens) for part in path(node)[:-1])
            for number in node.ends:
                ends[number] = [token for part in path(node) for token in part.tokens]
        assert [ends[number] for number in range(len(sequences))] == sequences

    def test_cheap_ones_go_first_and_long_ones_stay(self):
        def beginnings(most):
            sequences = [[1, 2, 9, n, 5, 5] for n in range(3)] + [[3, n, 4, 4] for n in range(2)]
            return [list(node.tokens[:4]) for node in without_short_runs(prefix_tree(sequences), 3, most)]

        assert beginnings(0) == [[1, 2, 9], [3]]
        assert beginnings(1) == [[1, 2, 9], [3, 0, 4, 4], [3, 1, 4, 4]]
        assert beginnings(1000)[0] == [1, 2, 9]

    def test_a_run_within_a_text_too(self):
        shared = list(range(10, 30))
        sequences = [[*shared, 1, n, *range(30, 40)] for n in range(4)] + [[*shared, 2, *range(30, 40)]]
        (root,) = without_short_runs(prefix_tree(sequences), 16, 3)
        assert [list(child.tokens[:2]) for child in root.children] == [[2, 30], [1, 0], [1, 1], [1, 2], [1, 3]]


class TestWhereMemoryRunsOut:
    @pytest.fixture
    def small(self, model, monkeypatch):
        """A machine that holds so many new tokens of a pass, and notes how many there were."""
        passes = []

        def hold(most):
            forward = type(model).forward

            def limited(self, ids, **options):
                passes.append(ids.numel())
                if ids.numel() > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return forward(self, ids, **options)

            monkeypatch.setattr(type(model), "forward", limited)
            return passes

        return hold

    sequences = torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()

    def test_batches_are_halved_and_scores_stay(self, model, small, caplog):
        expected = dict(Engine(model).score(self.sequences))
        passes = small(70)
        engine = Engine(model)
        scores = dict(engine.score(self.sequences))
        for number, scored in expected.items():
            np.testing.assert_allclose(scores[number].logprobs, scored.logprobs, atol=1e-5)
        # Failed passes shrink, and nothing that fits is run twice.
        assert sum(tokens for tokens in passes if tokens <= 70) == engine.counts.computed
        assert engine.max_tokens <= 132
        assert len(caplog.records) == 1

        passes.clear()
        dict(engine.score(self.sequences))
        assert max(passes) <= 140, "what follows stays small"

    def test_prompts_are_continued_by_fewer_rows(self, model, small, caplog):
        options = {"max_new_tokens": 5}
        expected = dict(Engine(model).generate(self.sequences, **options))
        passes = small(60)
        made = list(Engine(model).generate(self.sequences, **options))
        assert dict(made) == expected
        assert len(made) == len(expected), "a prompt is continued once"
        assert min(passes) < max(passes)
        assert len(caplog.records) == 1

    def test_rows_that_have_finished_are_not_done_again(self, model, monkeypatch):
        prompts = [[1, 2], [3, 4], [5, 6], [7, 8]]
        plain = dict(Engine(model).generate(prompts, max_new_tokens=6))
        decoded = []

        class Breaks(Decoder):
            def __iter__(self):
                decoded.append([tuple(prompt) for prompt in self._prompts])
                for round_, made in enumerate(super().__iter__()):
                    yield made
                    if len(decoded) == 1 and round_ == 1:
                        raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("lightning_dsv3.evaluation.engine.Decoder", Breaks)
        end = plain[0][0]
        again = dict(Engine(model).generate(prompts, max_new_tokens=6, eos_token_ids=[end]))
        for number, tokens in plain.items():
            stop = tokens.index(end) + 1 if end in tokens else len(tokens)
            assert again[number] == tokens[:stop]
        assert (1, 2) in decoded[0]
        assert all((1, 2) not in rows for rows in decoded[1:])

    def test_a_text_that_does_not_fit_alone_is_an_error(self, model, small):
        small(5)
        with pytest.raises(torch.OutOfMemoryError):
            dict(Engine(model).score(self.sequences[:2]))
        with pytest.raises(torch.OutOfMemoryError):
            dict(Engine(model).generate(self.sequences[:2], max_new_tokens=2))
