"""Generation: the likeliest tokens are those of the whole text at once, with drafts or without; samples as well."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_dsv3.inference import Decoder, LatentCache, Sampling, TextStream, extend, generate
from lightning_dsv3.inference.drafting import MTPDrafter
from lightning_dsv3.inference.sampling import draw, verify_greedy, verify_sampled
from lightning_dsv3.metrics import MTPAcceptance

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.707}


@pytest.fixture(scope="module")
def model():
    return tiny_model(std=0.1)


def prompts(*lengths, seed=0, vocab_size=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def greedy_by_hand(model, prompt, count):
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def decoded(model, texts, **options):
    """Token lists of every row, and why each ended."""
    new, ends = [[] for _ in texts], [""] * len(texts)
    for made in Decoder(model, texts, **options):
        for row, tokens, finished in made:
            assert tokens
            assert not ends[row]
            new[row] += tokens
            ends[row] = finished
    return new, ends


class TestGreedy:
    @pytest.mark.parametrize("overrides", [{}, {"rope_scaling": YARN}, {"q_lora_rank": None}], ids=str)
    @pytest.mark.parametrize("num_drafts", [None, 1, 3])
    def test_ragged_rows_continue_as_each_would_alone(self, overrides, num_drafts):
        model = tiny_model(std=0.1, **overrides)
        texts = prompts(1, 9, 4)
        new, ends = decoded(model, texts, max_new_tokens=12, num_drafts=num_drafts)
        assert new == [greedy_by_hand(model, text, 12) for text in texts]
        assert ends == ["length"] * 3

    @settings(max_examples=25, deadline=None)
    @given(
        depth=st.integers(1, 3),
        num_drafts=st.integers(1, 5),
        lengths=st.lists(st.integers(3, 12), min_size=1, max_size=4),
        new=st.integers(1, 20),
        chain=st.sampled_from(["post_norm", "pre_norm"]),
        state=st.sampled_from(["final_norm", "pre_norm"]),
        eos=st.integers(0, 63),
    )
    def test_drafts_change_nothing(self, depth, num_drafts, lengths, new, chain, state, eos):
        model = tiny_model(std=0.1, num_nextn_predict_layers=depth, mtp_chain_state=chain, mtp_input_state=state)
        texts = prompts(*lengths)
        options = {"max_new_tokens": new, "eos_token_ids": [eos, eos + 1]}
        assert decoded(model, texts, num_drafts=num_drafts, **options) == decoded(model, texts, **options)

    def test_drafts_of_a_model_that_repeats_are_accepted_and_passes_saved(self, monkeypatch):
        model = eager_model()
        passes = []
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
        acceptance = MTPAcceptance(3)
        new, _ = decoded(model, prompts(5), max_new_tokens=33, num_drafts=3, acceptance=acceptance)
        assert new == [greedy_by_hand(model, prompts(5)[0], 33)]
        assert acceptance.compute().tolist() == [1, 1, 1]
        # The prompt's pass gives one token; 32 more in 8 passes of 4. By hand there are 33.
        assert len(passes) == 1 + 8 + 33

    def test_hugging_face_continues_alike(self, model, tmp_path):
        from transformers import DeepseekV3ForCausalLM

        from lightning_dsv3.checkpoint import save_hf_checkpoint

        save_hf_checkpoint(model, tmp_path)
        theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None
        ids = torch.tensor(prompts(7, 7))
        mask = torch.ones_like(ids)
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0)
        assert torch.equal(generate(model, ids, max_new_tokens=15), expected)

    def test_bfloat16_continues_as_it_scores(self):
        model = tiny_model(std=0.3).to(torch.bfloat16)
        texts = prompts(4, 9)
        for num_drafts in (None, 2):
            new, _ = decoded(model, texts, max_new_tokens=12, num_drafts=num_drafts)
            for text, tokens in zip(texts, new, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([text + tokens])).logits[0].float()
                # Rounding flips a choice of experts here and there, and then a token.
                likeliest = logits.argmax(-1)[len(text) - 1 : -1].tolist()
                assert sum(a == b for a, b in zip(tokens, likeliest, strict=True)) >= 10

    def test_long_prompts_run_in_pieces(self, model, monkeypatch):
        texts = prompts(23, 5, 16, 8)
        expected = decoded(model, texts, max_new_tokens=6, num_drafts=1)
        monkeypatch.setattr("lightning_dsv3.inference.generation._PREFILL_COLUMNS", 8)
        assert decoded(model, texts, max_new_tokens=6, num_drafts=1) == expected

    def test_a_forked_prefix_is_gone_on_from(self, model):
        prefix, *rest = prompts(10, 2, 3, 1)
        cache = LatentCache(model.config, 1)
        extend(model, cache, torch.tensor([prefix]))
        new, _ = decoded(model, rest, max_new_tokens=8, cache=cache.fork([0, 0, 0]))
        assert new == [greedy_by_hand(model, prefix + text, 8) for text in rest]


class TestDrafter:
    """What the drafter says from its caches is what the modules say of the whole text at once."""

    @pytest.mark.parametrize("chain", ["post_norm", "pre_norm"])
    @pytest.mark.parametrize("state", ["final_norm", "pre_norm"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_drafts_are_those_of_the_uncached_modules(self, depth, state, chain, monkeypatch):
        model = tiny_model(std=0.1, num_nextn_predict_layers=depth, mtp_input_state=state, mtp_chain_state=chain)
        texts = prompts(3, 8, 5)
        known = [list(text) for text in texts]
        checked = []
        original = MTPDrafter.draft

        def draft(self, states, next_tokens, num_known, choose):
            # What the decoder says has become known is put behind the texts, and every draft made by hand.
            first = not self._carried and not any(self._caches[0].lengths)
            drafts = original(self, states, next_tokens, num_known, choose)
            for row, count in enumerate(num_known):
                new = next_tokens[row, :count].tolist()
                known[row] = known[row] + (new[-1:] if first else new)
                text = list(known[row])
                for k, token in enumerate(drafts.tokens[row].tolist(), start=1):
                    if k <= depth:
                        with torch.no_grad():
                            logits = model(torch.tensor([text]), use_mtp=True).mtp_logits[k - 1]
                        assert token == int(logits[0, -1].argmax())
                        text.append(token)
                        checked.append(k)
            return drafts

        monkeypatch.setattr(MTPDrafter, "draft", draft)
        decoded(model, texts, max_new_tokens=10, num_drafts=depth)
        assert collections.Counter(checked)[depth] >= 3 * 4

    def test_beyond_its_depth_the_last_module_reads_its_own_state(self):
        model = tiny_model(std=0.1)
        text = prompts(6)[0]
        drafter = MTPDrafter(model, 1, 3)
        cache = LatentCache(model.config, 1)
        output = extend(model, cache, torch.tensor([text]))
        token = int(model.head(output.hidden[0, -1]).argmax())
        from lightning_dsv3.inference.drafting import Choice

        drafts = drafter.draft(
            drafter.states(output),
            torch.tensor([[*text[1:], token]]),
            [6],
            lambda logits: Choice(logits.argmax(-1), None),
        ).tokens[0]
        with torch.no_grad():
            states, tokens = output.hidden, [*text[1:], token]
            for draft in drafts.tolist():
                positions = model._positions(states, None)
                _, after, _ = model.mtp[0](states, model.embedding(torch.tensor([tokens])), positions)
                assert draft == int(model.head(after[0, -1]).argmax())
                states, tokens = torch.cat([states, after[:, -1:]], dim=1), [*tokens, draft]
        assert drafter._caches[0].lengths == [6]


class TestSampling:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        temperature=st.floats(0.2, 3),
        top_k=st.one_of(st.none(), st.integers(1, 12)),
        top_p=st.floats(0.05, 1),
    )
    def test_distributions_are_hugging_faces(self, seed, temperature, top_k, top_p):
        logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k is not None:
            warpers.append(TopKLogitsWarper(top_k))
        warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(None, logits.clone()).softmax(-1)
        torch.testing.assert_close(Sampling(temperature, top_k, top_p).probabilities(logits), expected)

    def test_draws_follow_the_weights(self):
        p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
        uniform = (torch.arange(10_000) + 0.5) / 10_000
        counts = torch.bincount(draw(p.expand(10_000, -1), uniform), minlength=6)
        assert counts.tolist() == [0, 1000, 0, 6000, 3000, 0]
        assert draw(p, torch.tensor(1 - 1e-16, dtype=torch.float64)) == 4

    def test_a_row_draws_the_same_whatever_its_neighbours_do(self, model):
        texts = prompts(4, 7, 5)
        options = {"max_new_tokens": 10, "sampling": Sampling(1.5)}
        for num_drafts in (None, 2):
            alone = [
                decoded(model, [text], seeds=[seed], num_drafts=num_drafts, **options)[0][0]
                for seed, text in zip((3, 1, 4), texts, strict=True)
            ]
            together, _ = decoded(model, texts, seeds=[3, 1, 4], num_drafts=num_drafts, **options)
            assert together == alone
        assert decoded(model, texts, seeds=7, **options) == decoded(model, texts, seeds=[7, 8, 9], **options)
        assert decoded(model, texts, seeds=7, **options) != decoded(model, texts, seeds=8, **options)

    @pytest.mark.parametrize("num_drafts", [1, 2, 3])
    @pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8)], ids=str)
    def test_drafts_leave_the_distribution_as_it_is(self, sampling, num_drafts):
        """All texts of three tokens over a vocabulary of 6: counts against the exact probabilities, by chi-square."""
        model = tiny_model(vocab_size=6, std=0.5, num_nextn_predict_layers=2)
        prompt, rows = [1, 4, 2], 4000
        new, _ = decoded(model, [prompt] * rows, max_new_tokens=3, sampling=sampling, seeds=0, num_drafts=num_drafts)
        counts = collections.Counter(map(tuple, new))
        statistic, cells, rest, rest_seen = 0.0, 0, 0.0, 0
        for a, b, c in torch.cartesian_prod(*[torch.arange(6)] * 3).tolist():
            with torch.no_grad():
                p = sampling.probabilities(model(torch.tensor([[*prompt, a, b, c]])).logits[0])
            expected = rows * float(p[2, a] * p[3, b] * p[4, c])
            seen = counts.pop((a, b, c), 0)
            if expected >= 5:
                statistic, cells = statistic + (seen - expected) ** 2 / expected, cells + 1
            else:
                rest, rest_seen = rest + expected, rest_seen + seen
        assert not counts
        if rest >= 5:
            statistic, cells = statistic + (rest_seen - rest) ** 2 / rest, cells + 1
        # Mean plus 4.5 standard deviations of a chi-square; the draws are seeded, so this does not change by chance.
        assert cells > 8
        assert statistic < (cells - 1) + 4.5 * (2 * (cells - 1)) ** 0.5

    def test_verdicts_on_given_drafts(self):
        logits = torch.eye(4)[torch.tensor([[1, 2, 3], [1, 2, 3], [0, 0, 0]])]
        drafts = torch.tensor([[1, 2], [1, 0], [3, 0]])
        verdict = verify_greedy(logits, drafts, torch.tensor([2, 2, 2]))
        assert verdict.accepted.tolist() == [2, 1, 0]
        assert verdict.token.tolist() == [3, 2, 0]
        # A row that has fewer drafts goes on from the token behind its last.
        assert verify_greedy(logits, drafts, torch.tensor([1, 0, 1])).token.tolist() == [2, 1, 0]
        q = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])
        p = torch.tensor([[[0.0, 0.25, 0.75, 0.0], [0.0, 0.0, 0.0, 1.0]]])
        for uniform, accepted, token in ((0.49, 1, 3), (0.51, 0, 2)):
            verdict = verify_sampled(p, q, torch.tensor([[1]]), torch.tensor([1]), torch.tensor([[uniform, 0.3]]))
            assert (verdict.accepted.item(), verdict.token.item()) == (accepted, token)


class TestEnds:
    def test_end_of_sentence_ends_its_row_alone_and_is_kept(self, model):
        texts = prompts(4, 6, 9)
        plain, _ = decoded(model, texts, max_new_tokens=20)
        eos = plain[1][5]
        for num_drafts in (None, 2):
            new, ends = decoded(model, texts, max_new_tokens=20, eos_token_ids=[eos], num_drafts=num_drafts)
            for row, text in enumerate(plain):
                expected = text[: text.index(eos) + 1] if eos in text else text
                assert (new[row], ends[row]) == (expected, "eos" if eos in text else "length")

    def test_stop_strings_reach_across_tokens(self, model):
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
        texts = prompts(4, 6)

        def decode(ids):
            return "".join(letters[i] for i in ids)

        plain, _ = decoded(model, texts, max_new_tokens=20)
        stop = decode(plain[0][3:6])
        for num_drafts in (None, 2):
            new, ends = decoded(
                model, texts, max_new_tokens=20, stop=["never there", stop], decode=decode, num_drafts=num_drafts
            )
            end = decode(plain[0]).index(stop) + 3
            assert (new[0], ends[0]) == (plain[0][:end], "stop")
            if stop not in decode(plain[1]):
                assert (new[1], ends[1]) == (plain[1], "length")

    def test_generate_pads_behind_the_end_and_keeps_the_prompt_as_it_was_given(self, model):
        ids = torch.tensor([[9, 9, 3, 4], [5, 6, 7, 8], [1, 2, 9, 9]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
        plain = generate(model, ids, max_new_tokens=6, attention_mask=mask)
        assert torch.equal(plain[:, :4], ids)
        assert plain[0, 4:].tolist() == greedy_by_hand(model, [3, 4], 6)
        assert plain[2, 4:].tolist() == greedy_by_hand(model, [1, 2], 6)
        eos = int(plain[0, 6])
        ended = generate(model, ids, max_new_tokens=6, attention_mask=mask, eos_token_id=eos, pad_token_id=63)
        first = plain[0, 4:].tolist().index(eos) + 1
        assert ended[0, 4:].tolist()[:first] == plain[0, 4:].tolist()[:first]
        assert set(ended[0, 4 + first :].tolist()) <= {63}

    def test_finished_rows_leave_the_batch(self, model, monkeypatch):
        texts = prompts(4, 6, 9)
        plain, _ = decoded(model, texts, max_new_tokens=20)
        eos = plain[1][5]
        sizes = []
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda ids, **k: sizes.append(ids.numel()) or forward(ids, **k))
        decoded(model, texts, max_new_tokens=20, eos_token_ids=[eos])
        live = [sum(eos not in text[:done] for text in plain) for done in range(20)]
        assert sizes == [4 + 6 + 9, *(size for size in live[1:] if size)]

    def test_nothing_wanted_is_nothing_done(self, model):
        ids = torch.tensor(prompts(4))
        assert torch.equal(generate(model, ids, max_new_tokens=0), ids)


class TestTextStream:
    @settings(max_examples=200, deadline=None)
    @given(text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=4), max_size=2), cut=st.integers(1, 3))
    def test_what_is_shown_adds_up_to_the_text_before_the_first_stop(self, text, stop, cut):
        data = text.encode("utf-8", "surrogatepass")
        text = data.decode("utf-8", "replace")
        pieces = [data[i : i + cut] for i in range(0, len(data), cut)]
        stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace"), stop)
        shown = "".join(stream.push([index]) for index in range(len(pieces))) + stream.finish()
        ends = [text.index(word) for word in stop if word in text]
        # Later stop strings may complete earlier than one that began before them; the text ends where the first
        # complete one begins.
        complete = [(text.index(word) + len(word), text.index(word)) for word in stop if word in text]
        assert shown == stream.text
        if not ends:
            assert (shown, stream.stopped) == (text, False)
        else:
            assert stream.stopped
            assert text.startswith(shown)
            assert len(shown) <= max(end for _, end in complete)
            assert not any(word in shown for word in stop)

    def test_a_character_in_several_tokens_waits_for_its_end(self):
        data = [bytes([byte]) for byte in "é语🎉".encode()]
        stream = TextStream(lambda ids: b"".join(data[i] for i in ids).decode("utf-8", "replace"))
        assert [stream.push([i]) for i in range(len(data))] == ["", "é", "", "", "语", "", "", "", "🎉"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1, 2], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 64]]}, "prompt 0 has a token that is not from 0 to vocab_size - 1 = 63"),
        ({"max_new_tokens": 1023}, r"prompt 0 has 3 tokens and max_new_tokens=1023.*max_position_embeddings=1024"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"stop": ["a"]}, "give decode"),
        ({"stop": [""], "decode": str}, "empty string"),
        ({"num_drafts": 0}, "num_drafts=0"),
        ({"seeds": [1, 2]}, "seeds: has 2 values for 1 rows"),
        ({"sampling": (0.0,)}, "temperature=0.0"),
        ({"sampling": (1.0, 0)}, "top_k=0"),
        ({"sampling": (1.0, None, 0.0)}, r"top_p=0.0"),
    ],
)
def test_what_cannot_be_is_one_clear_error(model, options, message):
    options = {"prompts": [[1, 2, 3]], "max_new_tokens": 4} | options
    sampling = options.pop("sampling", None)
    with pytest.raises(ValueError, match=message):
        list(Decoder(model, **options, sampling=None if sampling is None else Sampling(*sampling)))


def test_the_whole_context_can_be_used(model):
    small = tiny_model(std=0.1, max_position_embeddings=12)
    text = prompts(5)[0]
    for num_drafts in (None, 1, 4):
        new, _ = decoded(small, [text], max_new_tokens=8, num_drafts=num_drafts)
        assert new == [greedy_by_hand(small, text, 8)]


def test_a_model_without_mtp_cannot_draft():
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        generate(tiny_model(num_nextn_predict_layers=0), torch.tensor([[1, 2]]), max_new_tokens=2, speculative=True)


def eager_model():
    """A model that always says token 7, and whose MTP module does too."""
    model = tiny_model(std=0.1)
    with torch.no_grad():
        model.norm.weight.zero_()
        for module in model.mtp:
            module.norm.weight.zero_()
        model.norm.weight[0] = model.mtp[0].norm.weight[0] = 1.0
        model.head.weight[:, 0] = 0.0
    model.head.weight.requires_grad_(False)
    return ConstantHead.of(model)


class ConstantHead(torch.nn.Module):
    """A head whose likeliest token is always 7."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    @classmethod
    def of(cls, model):
        model.head = cls(model.head.weight)
        return model

    def forward(self, x):
        logits = torch.zeros(*x.shape[:-1], self.weight.shape[0])
        logits[..., 7] = 1.0
        return logits
