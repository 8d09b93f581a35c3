"""Multiple choice from log-likelihoods, and bits per byte.

With ``logp(o)`` the sum of the log-probabilities of option o's tokens given the context, the chosen option is the
argmax (the first of equals) of

=================  =====================================================  ==========================================
metric             quantity                                               source
=================  =====================================================  ==========================================
``acc``            logp(o)                                                lm-eval
``acc_norm``       logp(o) / characters of o                              lm-eval
``acc_ppl``        logp(o) / tokens of o: the lowest perplexity           DeepSeek LLM (arXiv 2401.02954), 5.1: all
                                                                          benchmarks but ARC and OpenBookQA
``acc_uncond``     logp(o) - logp(o after a neutral context)              the same section: ARC and OpenBookQA
``acc_ppl_full``   logp(context and o) / tokens of context and o          OpenCompass, perplexity of the whole text
=================  =====================================================  ==========================================
"""

import math
from collections.abc import Iterable, Sequence

_Numbers = Sequence[float]


def score_choices(
    options: Sequence[str],
    gold: int | Sequence[int],
    log_likelihoods: _Numbers,
    *,
    num_tokens: Sequence[int] | None = None,
    unconditional: _Numbers | None = None,
    full_log_likelihoods: _Numbers | None = None,
    full_num_tokens: Sequence[int] | None = None,
) -> dict[str, float]:
    """Score one question with every rule whose inputs are there.

    Args:
        options: Text of each option, without the delimiter before it.
        gold: Index of the right option, or several indices of which any is right.
        log_likelihoods: log p(option | context) in nats, summed over the option's tokens.
        num_tokens: Tokens of each option; gives ``acc_ppl``.
        unconditional: log p(option | neutral context) in nats; gives ``acc_uncond``.
        full_log_likelihoods: log p(context and option) in nats; with ``full_num_tokens`` gives ``acc_ppl_full``.
        full_num_tokens: Tokens of context and option together.

    Returns:
        The accuracies (0 or 1) and ``bpb``: bits per UTF-8 byte of the right option's text (the best of several).

    Raises:
        ValueError: If lengths differ, an option is empty, a count is not positive, a number is NaN, or an index is out
            of range.

    Example:
        >>> score_choices(["yes", "no, never"], 1, [-3.0, -4.0], num_tokens=[1, 3])["acc_ppl"]
        1.0
    """
    golds = {gold} if isinstance(gold, int) else set(gold)
    if not golds or not all(0 <= index < len(options) for index in golds):
        raise ValueError(f"gold must be one or more indices of the {len(options)} options, got {gold!r}")
    if not all(options):
        raise ValueError(f"options: every option needs text, got {list(options)!r}")
    if (full_log_likelihoods is None) != (full_num_tokens is None):
        raise ValueError("full_log_likelihoods and full_num_tokens belong together: give both or neither")
    sums = _checked("log_likelihoods", log_likelihoods, options)
    rankings = {"acc": sums, "acc_norm": _ratio(sums, [len(option) for option in options])}
    if num_tokens is not None:
        rankings["acc_ppl"] = _ratio(sums, _counts("num_tokens", num_tokens, options))
    if unconditional is not None:
        neutral = _checked("unconditional", unconditional, options)
        rankings["acc_uncond"] = [given - alone for given, alone in zip(sums, neutral, strict=True)]
    if full_log_likelihoods is not None and full_num_tokens is not None:
        whole = _checked("full_log_likelihoods", full_log_likelihoods, options)
        rankings["acc_ppl_full"] = _ratio(whole, _counts("full_num_tokens", full_num_tokens, options))
    scores = {name: float(values.index(max(values)) in golds) for name, values in rankings.items()}
    return scores | {"bpb": min(bits_per_byte([sums[index]], [options[index]]) for index in golds)}


def bits_per_byte(log_likelihoods: Iterable[float], texts: Iterable[str]) -> float:
    """-sum(log p) / (ln 2 * UTF-8 bytes), over one text or a whole corpus (long texts weigh by their bytes).

    Args:
        log_likelihoods: log p of each text in nats.
        texts: The texts, in the same order. Empty ones add nothing.

    Raises:
        ValueError: If the numbers of items differ or there is not one byte.

    Example:
        >>> bits_per_byte([-math.log(2) * 6], ["中文"])
        1.0
    """
    pairs = list(zip(log_likelihoods, texts, strict=True))
    num_bytes = sum(len(text.encode("utf-8")) for _, text in pairs)
    if not num_bytes:
        raise ValueError("texts: bits per byte of no text is undefined; give at least one that is not empty")
    return -sum(value for value, _ in pairs) / (math.log(2) * num_bytes)


def _checked(name: str, values: _Numbers, options: Sequence[str]) -> list[float]:
    if len(values) != len(options) or any(math.isnan(value) for value in values):
        raise ValueError(f"{name} must hold one number for each of the {len(options)} options, got {list(values)!r}")
    return [float(value) for value in values]


def _counts(name: str, values: Sequence[int], options: Sequence[str]) -> Sequence[int]:
    if len(values) != len(options) or min(values) < 1:
        raise ValueError(f"{name} must hold one positive count for each of the {len(options)} options, got {values!r}")
    return values


def _ratio(sums: list[float], counts: Sequence[int]) -> list[float]:
    return [value / count for value, count in zip(sums, counts, strict=True)]
