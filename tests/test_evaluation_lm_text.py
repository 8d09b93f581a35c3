"""Text, tokens and conversations as lm-eval's own code has them."""

import json
import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model
from tiny_tasks import write_tasks
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.config import ConfigError
from lightning_dsv3.data import load_tokenizer, save_tokenizer

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lightning_dsv3.evaluation.lm import DSV3LM  # noqa: E402
from lightning_dsv3.evaluation.lm_text import lines_have_tokens_of_their_own, text_encoder  # noqa: E402

VOCAB = 1024
END = "<｜end▁of▁sentence｜>"
# What the patterns tell apart, ends of lines that Python and they know differently, and special tokens' names.
PIECES = [
    "\n", "\n\n", "\r\n", "\r", " ", "  ", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028", "\u2029", "\u3000",
    "\u200b", "\x00", "e\u0301", "\u0301", "a", "the cat", "Übung", "猫", "の", "한", "7", "12345", "٣", "Ⅷ", "½", ".",
    "?!", "。", "：", "(x)", "_a", "$", "€", "+", "😀", "👨‍👩‍👧", "#include",
    "'s", END, "<｜begin▁of▁sentence｜>", "<", "｜",
]  # fmt: skip
text = st.lists(
    st.one_of(st.sampled_from(PIECES), st.sampled_from("\n\n\n "), st.characters(codec="utf-8")), max_size=14
)
text = text.map("".join)


@pytest.fixture(scope="module", params=[300, 4096, 129_280])
def tokenizer(request):
    return load_tokenizer(request.param)


class TestLines:
    @pytest.mark.parametrize("names_are_text", [True, False])
    @settings(max_examples=250, deadline=None)
    @given(words=text)
    def test_tokens_are_those_of_the_whole_text(self, tokenizer, names_are_text, words):
        tokenizer.encode_special_tokens = names_are_text
        assert lines_have_tokens_of_their_own(tokenizer)
        assert text_encoder(tokenizer)(words) == tokenizer.encode(words, add_special_tokens=False).ids

    def test_each_line_is_encoded_once(self, monkeypatch):
        seen = []

        class Counting:
            def __init__(self, tokenizer):
                self._tokenizer = tokenizer

            def __getattr__(self, name):
                return getattr(self._tokenizer, name)

            def encode(self, words, **options):
                seen.append(words)
                return self._tokenizer.encode(words, **options)

        encode = text_encoder(Counting(load_tokenizer(300)))
        block = "Q: one?\n\nA: 1\n\n"
        for question in ("two", "three"):
            for letter in ("", " A", " B"):
                encode(f"{block}{block}Q: {question}?\nA:{letter}")
        assert len(seen) == len(set(seen)) == 2 + 2 + 3
        encode("A:")[:] = [0]
        assert encode("A:") != [0], "what is remembered is not what is given"

    def test_other_tokenizers_encode_texts_whole(self):
        def of(pre_tokenizer, normalizer=None, dropout=None):
            tokenizer = Tokenizer(models.BPE(dropout=dropout))
            tokenizer.pre_tokenizer = pre_tokenizer
            if normalizer is not None:
                tokenizer.normalizer = normalizer
            return tokenizer

        deepseek = load_tokenizer(300)
        splits = json.loads(deepseek.to_str())["pre_tokenizer"]["pretokenizers"][:-1]
        steps = [pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated") for step in splits]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        assert lines_have_tokens_of_their_own(of(pre_tokenizers.Sequence([*steps, bytes_])))
        for other in (
            of(pre_tokenizers.Sequence([*steps[1:], bytes_])),
            of(pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])),
            of(pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])),
            of(pre_tokenizers.Sequence([*steps, pre_tokenizers.Metaspace()])),
            of(pre_tokenizers.Sequence([])),
            of(pre_tokenizers.Whitespace()),
            of(pre_tokenizers.Sequence([*steps, bytes_]), normalizers.NFC()),
            of(pre_tokenizers.Sequence([*steps, bytes_]), dropout=0.5),
        ):
            assert not lines_have_tokens_of_their_own(other)
        tokenizer = load_tokenizer(300)
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
        assert not lines_have_tokens_of_their_own(tokenizer)
        words = "a\n<x>b"
        assert text_encoder(tokenizer)(words) == tokenizer.encode(words, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def lm():
    return DSV3LM(model=tiny_model(vocab_size=VOCAB), tokenizer=load_tokenizer(VOCAB))


class Plain(TemplateLM):
    """lm-eval's own way from texts to tokens."""

    eot_token_id = loglikelihood_rolling = generate_until = None

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    @property
    def prefix_token_id(self):
        return self.lm.prefix_token_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        tokens = self.lm.tokenizer.encode(string, add_special_tokens=False).ids
        begin = [] if add_special_tokens is False else [1]
        return tokens if begin and tokens[:1] == begin else [*begin, *tokens]

    def _loglikelihood_tokens(self, requests, **_):
        return requests


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(text, text.filter(bool)), min_size=1, max_size=4))
def test_requests_have_lm_evals_tokens(lm, pairs):
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "_loglikelihood_tokens", lambda requests, **_: requests)
        assert lm.loglikelihood(asked, disable_tqdm=True) == Plain(lm).loglikelihood(asked, disable_tqdm=True)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') if strict }}"
    "[{{ m.content }}]{% elif m.role == 'user' %}{{ '\nU: ' + m.content }}{% else %}{{ '\nA: ' + m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\nA:' }}{% endif %}"
)


def chat_folder(folder, template):
    save_hf_checkpoint(tiny_model(vocab_size=VOCAB, std=0.12, max_position_embeddings=512), folder)
    tokenizer = load_tokenizer(VOCAB)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    names = {kind: tokenizer.id_to_token(index) for index, kind in enumerate(("bos_token", "eos_token", "pad_token"))}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"), TEMPLATE)


class TestChat:
    @pytest.mark.parametrize("multiturn", [True, False])
    def test_a_run_with_a_template_is_that_of_hf(self, folder, tmp_path, multiturn):
        write_tasks(tmp_path)
        results = [
            lm_eval.simple_evaluate(
                model,
                tasks=["tiny_choice", "tiny_generation"],
                task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
                apply_chat_template=True,
                system_instruction="Be brief.",
                fewshot_as_multiturn=multiturn,
            )
            for model in (
                DSV3LM(checkpoint=folder, max_length=256),
                HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=256),
            )
        ]
        ours, theirs = (result["samples"] for result in results)
        prompt = ours["tiny_choice"][0]["arguments"][0][0]
        assert prompt.startswith("<｜begin▁of▁sentence｜>[Be brief.]\nU: The ")
        assert prompt.endswith("\nA:")
        assert prompt.count("\nA:") == (3 if multiturn else 1)
        for task in ours:
            for mine, hf in zip(ours[task], theirs[task], strict=True):
                assert mine["arguments"] == hf["arguments"]
                assert mine["filtered_resps"] == [
                    pytest.approx(r, abs=1e-4) if isinstance(r, tuple) else r for r in hf["filtered_resps"]
                ]
        assert results[0]["results"]["tiny_choice"]["acc,none"] == results[1]["results"]["tiny_choice"]["acc,none"]

    def test_the_template_has_the_one_begin_of_sentence(self, folder):
        lm = DSV3LM(checkpoint=folder, add_bos_token=True)
        text = lm.apply_chat_template([{"role": "user", "content": "hi"}])
        assert lm.tok_encode(text).count(0) == 1
        assert lm.chat_template(True) == TEMPLATE
        assert lm.chat_template(False) is None
        assert lm.tokenizer_name.endswith("tokenizer.json")

    def test_a_begun_answer_is_gone_on_with(self, folder):
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Answer: "}]
        assert (
            DSV3LM(checkpoint=folder).apply_chat_template(said, add_generation_prompt=False).endswith("\nA: Answer: ")
        )

    def test_a_template_without_a_system_role_gets_none(self, tmp_path, caplog):
        lm = DSV3LM(checkpoint=chat_folder(tmp_path, TEMPLATE.replace(" if strict", "")))
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        with caplog.at_level(logging.WARNING):
            assert lm.apply_chat_template(said) == "<｜begin▁of▁sentence｜>\nU: hi\nA:"
        assert "no system message" in caplog.text

    def test_one_of_several_templates_is_taken_by_its_name(self, tmp_path):
        named = [{"name": "default", "template": "d{{ messages[0].content }}"}, {"name": "rag", "template": "r"}]
        lm = DSV3LM(checkpoint=chat_folder(tmp_path, named))
        said = [{"role": "user", "content": "hi"}]
        assert lm.apply_chat_template(said) == "dhi"
        assert (lm.chat_template("rag"), lm.apply_chat_template(said)) == ("r", "r")
        assert (lm.chat_template(True), lm.apply_chat_template(said)) == (named[0]["template"], "dhi")
        with pytest.raises(ConfigError, match=re.escape("apply_chat_template=other: the tokenizer has default, rag")):
            lm.chat_template("other")

    def test_where_there_is_none_is_one_clear_error(self, tmp_path, lm):
        bare = DSV3LM(checkpoint=chat_folder(tmp_path, None))
        for model, place in ((bare, str(tmp_path)), (lm, "given")):
            with pytest.raises(ConfigError, match=re.escape(place)):
                model.chat_template(True)
            with pytest.raises(ConfigError, match="no chat template is beside the tokenizer"):
                model.apply_chat_template([{"role": "user", "content": "hi"}])
