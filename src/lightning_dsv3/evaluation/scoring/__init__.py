"""Scorers of the report's benchmarks: pure functions from a prediction and a gold answer to numbers."""

from .agieval import score_agieval_choice, score_agieval_cloze
from .choices import bits_per_byte, score_choices
from .literals import extract_call, extract_output, score_cruxeval_output
from .mathematics import is_equivalent, score_math
from .numbers import score_cmath, score_gsm8k
from .spans import score_cmrc, score_drop
from .text import score_answer, score_bbh, score_cluewsc, truncate

__all__ = [
    "bits_per_byte",
    "extract_call",
    "extract_output",
    "is_equivalent",
    "score_agieval_choice",
    "score_agieval_cloze",
    "score_answer",
    "score_bbh",
    "score_choices",
    "score_cluewsc",
    "score_cmath",
    "score_cmrc",
    "score_cruxeval_output",
    "score_drop",
    "score_gsm8k",
    "score_math",
    "truncate",
]
