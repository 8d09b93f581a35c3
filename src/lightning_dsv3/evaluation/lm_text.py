"""Text and its tokens for lm-eval: encoding what requests have in common once, and chat templates.

lm-eval encodes a request's context, and context and continuation together: a five-shot block is encoded eight times for
each question of four letters. Most of what a text consists of has been seen before, line by line. Whether the lines'
tokens are the text's depends on how a tokenizer splits text before it merges characters. DeepSeek's does it by three
patterns, none of which has a match that reaches over the end of a line into what is not white space, or that looks
further than that. So a text may be cut behind each line break that no white space follows. Any other tokenizer encodes
texts whole.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightning_dsv3.config import ConfigError

_log = logging.getLogger(__name__)

# Python's white space is all that the patterns take for it, and a little more.
_LINE = re.compile(r"(?<=\n)(?=\S)")
_DEEPSEEK_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+",
)  # fmt: skip
# Texts, or lines, whose tokens are kept.
_MOST_LINES = 1 << 15
_MOST_TEXTS = 16


def text_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    r"""Return a function from a text to its tokens, without special ones before or behind, that remembers its lines.

    >>> from lightning_dsv3.data import load_tokenizer
    >>> tokenizer = load_tokenizer(512)
    >>> text = "1 + 1 = 2\n2 + 2 = 4\n\n"
    >>> text_encoder(tokenizer)(text) == tokenizer.encode(text).ids
    True
    """
    by_line = lines_have_tokens_of_their_own(tokenizer)

    @lru_cache(maxsize=_MOST_LINES if by_line else _MOST_TEXTS)
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    if not by_line:
        return lambda text: list(encode(text))
    return lambda text: list(chain.from_iterable(map(encode, _LINE.split(text))))


def lines_have_tokens_of_their_own(tokenizer: Tokenizer) -> bool:
    """Whether a text's tokens are those of its lines; known of DeepSeek's way of splitting text alone."""
    splits = _state(tokenizer.pre_tokenizer)
    steps = splits.get("pretokenizers", [])
    patterns = tuple(step.get("pattern", {}).get("Regex") for step in steps[:-1])
    return (
        patterns == _DEEPSEEK_PATTERNS
        and all(
            step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] for step in steps[:-1]
        )
        and steps[-1]["type"] == "ByteLevel"
        and not steps[-1]["add_prefix_space"]
        and not steps[-1]["use_regex"]
        and (tokenizer.normalizer is None or _state(tokenizer.normalizer) == {"type": "Sequence", "normalizers": []})
        and getattr(tokenizer.model, "dropout", None) is None
        and not any(
            token.lstrip or token.rstrip or "\n" in token.content
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )


def _state(part: Any) -> dict[str, Any]:
    """Return what ``tokenizer.json`` says of a part of the tokenizer."""
    if part is None:
        return {}
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


class ChatTemplate:
    """Turns a conversation into the text that a chat model has been trained on.

    Args:
        source: The ``tokenizer.json`` beside which ``tokenizer_config.json`` or ``chat_template.jinja`` holds one.

    Raises:
        ConfigError: There is none.
    """

    def __init__(self, source: str) -> None:
        from transformers import PreTrainedTokenizerFast  # it comes with lm-eval's `hf`; needed for chat models alone

        folder = Path(source).parent
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if Path(source).is_file() else None
        if tokenizer is None or not tokenizer.chat_template:
            raise ConfigError(
                f"apply_chat_template: no chat template is beside the tokenizer ({source}); base models have none: "
                "leave the option out, or put chat_template.jinja there"
            )
        self._tokenizer = tokenizer
        self._name: str | None = None

    def choose(self, name: bool | str) -> str:
        """Take the template of a name, where there are several, and return its text.

        Raises:
            ConfigError: There is none of that name.
        """
        templates = self._tokenizer.chat_template
        if isinstance(templates, str):
            return templates
        self._name = name if isinstance(name, str) else "default"
        if self._name not in templates:
            raise ConfigError(f"apply_chat_template={self._name}: the tokenizer has {', '.join(sorted(templates))}")
        chosen: str = templates[self._name]
        return chosen

    def apply(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """Return the conversation as text; a template that knows no system's role gets none, as with ``hf``."""
        from jinja2.exceptions import TemplateError

        def render(some: Sequence[dict[str, str]]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                list(some),
                chat_template=self._name,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        try:
            return render(messages)
        except TemplateError:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            _log.warning("the chat template takes no system message: it is left out")
            return render(others)
