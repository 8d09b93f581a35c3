"""What the model says of a continuation: lm-eval's pair, and what a perplexity needs besides."""

from __future__ import annotations

from typing import Any


class Likelihood(tuple):
    """The pair ``(log-likelihood, is greedy)`` that lm-eval knows, and counts of tokens.

    Attributes:
        num_tokens: Tokens of the continuation.
        context_logprob: Log-likelihood in nats of the context's tokens behind its first; None where it was not asked.
        context_tokens: How many tokens that are.

    Example:
        >>> pair = Likelihood(-6.0, True, num_tokens=3, context_logprob=-14.0, context_tokens=7)
        >>> log_likelihood, is_greedy = pair
        >>> log_likelihood / pair.num_tokens, (pair.context_logprob + pair[0]) / (pair.context_tokens + pair.num_tokens)
        (-2.0, -2.0)
    """

    num_tokens: int
    context_logprob: float | None
    context_tokens: int

    def __new__(
        cls,
        log_likelihood: float,
        is_greedy: bool,
        *,
        num_tokens: int,
        context_logprob: float | None = None,
        context_tokens: int = 0,
    ) -> Likelihood:
        """Make the pair; a tuple is made here."""
        pair = super().__new__(cls, (log_likelihood, is_greedy))
        pair.num_tokens, pair.context_logprob, pair.context_tokens = num_tokens, context_logprob, context_tokens
        return pair

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (*self, self.num_tokens, self.context_logprob, self.context_tokens)


def _unpickle(
    log_likelihood: float, is_greedy: bool, num_tokens: int, context_logprob: float | None, context_tokens: int
) -> Likelihood:
    return Likelihood(
        log_likelihood,
        is_greedy,
        num_tokens=num_tokens,
        context_logprob=context_logprob,
        context_tokens=context_tokens,
    )
