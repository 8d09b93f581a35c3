"""The dsv3 model of lm-eval against lm-eval's own ``hf`` model on the same weights."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.config import ConfigError
from lightning_dsv3.data import load_tokenizer, save_tokenizer
from lightning_dsv3.evaluation.likelihood import Likelihood

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from lightning_dsv3.evaluation.lm import DSV3LM  # noqa: E402

VOCAB = 512
LENGTH = 96
WORDS = ["the cat", " sat", " on", "\n", "猫", "  ", "def f(x):", "A", " B", ".", "1 + 1 =", " "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_hf_checkpoint(tiny_model(vocab_size=VOCAB, std=0.12, max_position_embeddings=256), folder)
    tokenizer = load_tokenizer(VOCAB)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    names = {kind: tokenizer.id_to_token(index) for index, kind in enumerate(("bos_token", "eos_token", "pad_token"))}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return DSV3LM(checkpoint=folder, max_length=LENGTH)


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=LENGTH)


def requests(kind, *arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def assert_scores_agree(ours, theirs, pairs):
    mine = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    hf = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (mine_sum, mine_greedy), (hf_sum, hf_greedy) in zip(pairs, mine, hf, strict=True):
        assert mine_sum == pytest.approx(hf_sum, abs=1e-4), pair
        assert mine_greedy == hf_greedy, pair
    return mine


text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join)


class TestAgainstHF:
    @settings(max_examples=25, deadline=None)
    @given(shared=text, pairs=st.lists(st.tuples(text, text), min_size=1, max_size=6), empty=st.booleans())
    def test_log_likelihoods(self, ours, theirs, shared, pairs, empty):
        pairs = [("A" + shared + context, " " + continuation) for context, continuation in pairs]
        if empty:
            pairs.append(("", "the cat sat"))
        assert_scores_agree(ours, theirs, pairs)

    def test_a_context_of_white_space_is_an_empty_one(self, ours):
        pairs = [("", "\n A"), ("\n", " A")]
        mine = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        assert mine[0] == mine[1]

    def test_texts_that_are_too_long_lose_their_beginning(self, ours, theirs):
        assert_scores_agree(ours, theirs, [("the cat sat. " * 60, " on the cat"), ("A", " the cat sat." * 12)])

    def test_rolling_windows(self, ours, theirs):
        texts = [("the cat sat on 猫. " * 40,), ("A",), ("def f(x):\n" * 7,)]
        mine = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
        hf = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
        assert mine == pytest.approx(hf, abs=2e-3)

    @pytest.mark.parametrize("until", [["\n"], [".", "cat"], []])
    def test_greedy_text(self, ours, theirs, until):
        prompts = ["the cat", "the cat sat", "the cat", "def f(x):\n", "猫", "A. B. " * 40]
        asked = requests("generate_until", *[(prompt, {"until": until, "max_gen_toks": 20}) for prompt in prompts])
        assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)

    def test_drafting_changes_no_text(self, folder, ours):
        drafting = DSV3LM(checkpoint=folder, max_length=LENGTH, speculative="true", num_drafts="2")
        asked = requests("generate_until", *[(word, {"until": ["\n"], "max_gen_toks": 24}) for word in WORDS[:4]])
        assert drafting.generate_until(asked, disable_tqdm=True) == ours.generate_until(asked, disable_tqdm=True)


class TestLikelihoods:
    def test_perplexities_of_options_and_of_whole_texts(self, ours):
        (pair,) = ours.loglikelihood(requests("loglikelihood", ("the cat sat", " on the cat")), disable_tqdm=True)
        context, whole = (ours.tok_encode(t) for t in ("the cat sat", "the cat sat on the cat"))
        assert (pair.context_tokens, pair.num_tokens) == (len(context) - 1, len(whole) - len(context))
        with torch.no_grad():
            logprobs = ours._model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[i, token]) for i, token in enumerate(whole[1:]))
        assert pair.context_logprob + pair[0] == pytest.approx(expected, abs=1e-4)

    def test_they_go_through_a_pickle(self):
        pair = Likelihood(-1.5, False, num_tokens=2, context_logprob=-3.0, context_tokens=4)
        again = pickle.loads(pickle.dumps(pair))
        assert (tuple(again), again.num_tokens, again.context_logprob, again.context_tokens) == (
            (-1.5, False), 2, -3.0, 4,
        )  # fmt: skip

    @pytest.mark.parametrize("batch_size", [1, "3", "auto", "auto:4"])
    def test_scores_do_not_depend_on_the_batch_size(self, folder, ours, batch_size):
        pairs = [(f"{a}{b}", c) for a in WORDS[:3] for b in WORDS[3:6] for c in (" A", " B", " the cat sat")]
        other = DSV3LM(checkpoint=folder, max_length=LENGTH, batch_size=batch_size)
        mine, again = (m.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for m in (ours, other))
        assert [pair[0] for pair in mine] == pytest.approx([pair[0] for pair in again], abs=1e-4)

    def test_whole_sequences_can_be_left_out(self, folder):
        lean = DSV3LM(checkpoint=folder, whole_sequence="false")
        (pair,) = lean.loglikelihood(requests("loglikelihood", ("the cat", " sat")), disable_tqdm=True)
        assert pair.context_logprob is None


class TestTokens:
    def test_a_model_of_this_package_begins_behind_an_end_of_sentence(self):
        lm = DSV3LM(model=tiny_model(vocab_size=VOCAB), tokenizer=load_tokenizer(VOCAB))
        assert lm.tok_encode("A")[0] == lm.eot_token_id == lm.prefix_token_id == 1
        assert lm.tok_encode("A", add_special_tokens=False) == lm.tok_encode("A")[1:]

    def test_begin_of_sentence_is_put_once_and_never_scored(self, folder):
        lm = DSV3LM(checkpoint=folder, add_bos_token="true", max_length=LENGTH)
        assert lm.tok_encode("A")[0] == 0 == lm.prefix_token_id
        plain = DSV3LM(checkpoint=folder, max_length=LENGTH)
        rolling = [m.loglikelihood_rolling(requests("loglikelihood_rolling", ("the cat",)), True) for m in (lm, plain)]
        assert rolling[0] == pytest.approx(rolling[1])

    def test_sampling_follows_lm_evals_seed(self, ours):
        asked = requests("generate_until", *[("A", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})] * 3)
        texts = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            texts.append(ours.generate_until(asked, disable_tqdm=True))
        assert texts[0] == texts[1] != texts[2]
        assert len(set(texts[0])) > 1


def test_what_has_been_computed_is_kept_when_a_run_breaks_off(ours, monkeypatch):
    kept = []
    monkeypatch.setattr(ours.cache_hook, "add_partial", lambda kind, args, result: kept.append((kind, args)))
    monkeypatch.setattr(ours._engine, "max_rows", 1)
    calls = []
    extend = ours._engine._extend

    def fail_on_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extend(*args)

    monkeypatch.setattr(ours._engine, "_extend", fail_on_the_third)
    pairs = [(word, " A") for word in ("the cat sat on", "def f(x):", "1 + 1 =", "A")]
    with pytest.raises(KeyboardInterrupt):
        ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert len(kept) == 2
    assert {args for _, args in kept} < set(pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": None}, "checkpoint: give"),
        ({"max_length": 1000}, "max_length=1000: the model has max_position_embeddings=256"),
        ({"max_length": "long"}, "max_length=long: must be a whole number"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"whole_sequence": "maybe"}, "whole_sequence=maybe"),
        ({"speculative": True, "num_drafts": 0}, "num_drafts=0"),
        ({"checkpoint": "not/there"}, "not/there"),
    ],
)
def test_what_cannot_be_is_one_clear_error(folder, options, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        DSV3LM(**({"checkpoint": folder} | options))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_gen_toks": 96}, "max_gen_toks=96"),
        ({"num_beams": 4}, "num_beams"),
        ({"top_p": 0.0, "do_sample": True}, "top_p"),
    ],
)
def test_generation_that_cannot_be_is_one_clear_error(ours, given, message):
    asked = requests("generate_until", ("A", {"max_gen_toks": 8 if given else 96} | given))
    with pytest.raises(ValueError, match=message):
        ours.generate_until(asked, disable_tqdm=True)


def test_a_gpu_that_is_not_there_is_the_cpu(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert DSV3LM(checkpoint=folder, device="cuda:0").device.type == "cpu"


def test_texts_that_lost_their_beginning_are_counted_and_said_once(ours, caplog):
    pairs = [("the cat sat. " * n, " on") for n in (1, 60, 70, 80)]
    ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [r.getMessage() for r in caplog.records] == ["3 of 4 texts lost their beginning: max_length=96 tokens"]
    caplog.clear()
    asked = requests("generate_until", *[(text, {"until": ["\n"], "max_gen_toks": 4}) for text, _ in pairs])
    ours.generate_until(asked, disable_tqdm=True)
    assert [r.getMessage() for r in caplog.records] == ["3 of 4 texts lost their beginning: max_length=96 tokens"]
    caplog.clear()
    ours.loglikelihood(requests("loglikelihood", *pairs[:1]), disable_tqdm=True)
    assert not caplog.records


def test_in_bfloat16_the_batch_size_moves_scores_within_rounding(folder, ours):
    pairs = [(f"{a}{b}", c) for a in WORDS[:3] for b in WORDS[3:7] for c in (" A", " B", " the cat sat")]
    models = [DSV3LM(checkpoint=folder, dtype="bfloat16", max_length=LENGTH, batch_size=rows) for rows in (1, 8)]
    exact, one, eight = (
        [pair[0] for pair in lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
        for lm in (ours, *models)
    )
    assert one != exact
    for scores in (one, eight):
        assert scores == pytest.approx(exact, rel=0.05, abs=0.1)
    assert one == pytest.approx(eight, rel=0.05, abs=0.1)
    questions = range(0, len(pairs), 3)
    choices = [[max(range(n, n + 3), key=scores.__getitem__) for n in questions] for scores in (one, eight)]
    assert sum(a != b for a, b in zip(*choices, strict=True)) <= 1
