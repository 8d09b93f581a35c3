"""Published numbers of the DeepSeek-V3 report (arXiv 2412.19437): Tables 3, 4 and 5, as data.

Scores are in percent, Pile-test's in bits per byte, as printed there. Neither standard errors nor seeds nor the window
of an evaluation are published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedRow:
    """What Table 3 says of a benchmark.

    Attributes:
        section: The part of the table that it stands in.
        title: Its name there.
        metric: Its metric there: BPB, EM, F1 or Pass@1.
        shots: Worked examples in the prompt; None where there is no prompt.
    """

    section: str
    title: str
    metric: str
    shots: int | None


@dataclass(frozen=True)
class PublishedModel:
    """A published column.

    Attributes:
        name: Its heading.
        architecture: ``MoE`` or ``Dense``; None where the table does not say.
        activated: Parameters that a token uses, as printed.
        total: Parameters, as printed.
        training_tokens: Tokens that the model was trained on, as printed; None where the table does not say.
        scores: Score by benchmark.
    """

    name: str
    architecture: str | None
    activated: str
    total: str
    scores: Mapping[str, float] = field(repr=False)
    training_tokens: str | None = None


_ENGLISH, _CODE, _MATH, _CHINESE, _MULTILINGUAL = "English", "Code", "Math", "Chinese", "Multilingual"

# By benchmark: the row of Table 3, and the scores of DeepSeek-V2, Qwen2.5-72B, LLaMA-3.1-405B and DeepSeek-V3.
_TABLE_3: dict[str, tuple[PublishedRow, tuple[float, float, float, float]]] = {
    "pile_test": (PublishedRow(_ENGLISH, "Pile-test", "BPB", None), (0.606, 0.638, 0.542, 0.548)),
    "bbh": (PublishedRow(_ENGLISH, "BBH", "EM", 3), (78.8, 79.8, 82.9, 87.5)),
    "mmlu": (PublishedRow(_ENGLISH, "MMLU", "EM", 5), (78.4, 85.0, 84.4, 87.1)),
    "mmlu_redux": (PublishedRow(_ENGLISH, "MMLU-Redux", "EM", 5), (75.6, 83.2, 81.3, 86.2)),
    "mmlu_pro": (PublishedRow(_ENGLISH, "MMLU-Pro", "EM", 5), (51.4, 58.3, 52.8, 64.4)),
    "drop": (PublishedRow(_ENGLISH, "DROP", "F1", 3), (80.4, 80.6, 86.0, 89.0)),
    "arc_easy": (PublishedRow(_ENGLISH, "ARC-Easy", "EM", 25), (97.6, 98.4, 98.4, 98.9)),
    "arc_challenge": (PublishedRow(_ENGLISH, "ARC-Challenge", "EM", 25), (92.2, 94.5, 95.3, 95.3)),
    "hellaswag": (PublishedRow(_ENGLISH, "HellaSwag", "EM", 10), (87.1, 84.8, 89.2, 88.9)),
    "piqa": (PublishedRow(_ENGLISH, "PIQA", "EM", 0), (83.9, 82.6, 85.9, 84.7)),
    "winogrande": (PublishedRow(_ENGLISH, "WinoGrande", "EM", 5), (86.3, 82.3, 85.2, 84.9)),
    "race_middle": (PublishedRow(_ENGLISH, "RACE-Middle", "EM", 5), (73.1, 68.1, 74.2, 67.1)),
    "race_high": (PublishedRow(_ENGLISH, "RACE-High", "EM", 5), (52.6, 50.3, 56.8, 51.3)),
    "triviaqa": (PublishedRow(_ENGLISH, "TriviaQA", "EM", 5), (80.0, 71.9, 82.7, 82.9)),
    "naturalquestions": (PublishedRow(_ENGLISH, "NaturalQuestions", "EM", 5), (38.6, 33.2, 41.5, 40.0)),
    "agieval": (PublishedRow(_ENGLISH, "AGIEval", "EM", 0), (57.5, 75.8, 60.6, 79.6)),
    "humaneval": (PublishedRow(_CODE, "HumanEval", "Pass@1", 0), (43.3, 53.0, 54.9, 65.2)),
    "mbpp": (PublishedRow(_CODE, "MBPP", "Pass@1", 3), (65.0, 72.6, 68.4, 75.4)),
    "livecodebench": (PublishedRow(_CODE, "LiveCodeBench-Base", "Pass@1", 3), (11.6, 12.9, 15.5, 19.4)),
    "cruxeval_i": (PublishedRow(_CODE, "CRUXEval-I", "EM", 2), (52.5, 59.1, 58.5, 67.3)),
    "cruxeval_o": (PublishedRow(_CODE, "CRUXEval-O", "EM", 2), (49.8, 59.9, 59.9, 69.8)),
    "gsm8k": (PublishedRow(_MATH, "GSM8K", "EM", 8), (81.6, 88.3, 83.5, 89.3)),
    "math": (PublishedRow(_MATH, "MATH", "EM", 4), (43.4, 54.4, 49.0, 61.6)),
    "mgsm": (PublishedRow(_MATH, "MGSM", "EM", 8), (63.6, 76.2, 69.9, 79.8)),
    "cmath": (PublishedRow(_MATH, "CMath", "EM", 3), (78.7, 84.5, 77.3, 90.7)),
    "cluewsc": (PublishedRow(_CHINESE, "CLUEWSC", "EM", 5), (82.0, 82.5, 83.0, 82.7)),
    "ceval": (PublishedRow(_CHINESE, "C-Eval", "EM", 5), (81.4, 89.2, 72.5, 90.1)),
    "cmmlu": (PublishedRow(_CHINESE, "CMMLU", "EM", 5), (84.0, 89.5, 73.7, 88.8)),
    "cmrc": (PublishedRow(_CHINESE, "CMRC", "EM", 1), (77.4, 75.8, 76.0, 76.3)),
    "c3": (PublishedRow(_CHINESE, "C3", "EM", 0), (77.4, 76.7, 79.7, 78.6)),
    "ccpm": (PublishedRow(_CHINESE, "CCPM", "EM", 0), (93.0, 88.5, 78.6, 92.0)),
    "mmmlu": (PublishedRow(_MULTILINGUAL, "MMMLU-non-English", "EM", 5), (64.0, 74.8, 73.8, 79.4)),
}

ROWS: dict[str, PublishedRow] = {benchmark: row for benchmark, (row, _) in _TABLE_3.items()}

BASE_MODELS: dict[str, PublishedModel] = {
    key: PublishedModel(*facts, scores={benchmark: scores[place] for benchmark, (_, scores) in _TABLE_3.items()})
    for place, (key, facts) in enumerate(
        {
            "deepseek-v2": ("DeepSeek-V2 Base", "MoE", "21B", "236B"),
            "qwen2.5-72b": ("Qwen2.5 72B Base", "Dense", "72B", "72B"),
            "llama-3.1-405b": ("LLaMA-3.1 405B Base", "Dense", "405B", "405B"),
            "deepseek-v3": ("DeepSeek-V3 Base", "MoE", "37B", "671B"),
        }.items()
    )
}

_ABLATION_ROWS = "pile_test bbh mmlu drop triviaqa naturalquestions humaneval mbpp gsm8k math".split()  # noqa: SIM905

# Tables 4 and 5 have the rows of Table 3, but DROP with one shot.
ABLATION_SHOTS: dict[str, int | None] = {
    benchmark: 1 if benchmark == "drop" else ROWS[benchmark].shots for benchmark in _ABLATION_ROWS
}

ABLATION_TITLES = {
    "4": "Table 4: multi-token prediction (D = 1, discarded at inference)",
    "5": "Table 5: auxiliary-loss-free balancing",
}


def _arm(name: str, size: tuple[str, str, str], *scores: float) -> PublishedModel:
    activated, total, tokens = size
    return PublishedModel(name, None, activated, total, dict(zip(_ABLATION_ROWS, scores, strict=True)), tokens)


_SMALL, _LARGE_4, _LARGE_5 = ("2.4B", "15.7B", "1.33T"), ("20.9B", "228.7B", "540B"), ("20.9B", "228.7B", "578B")

# By table and size: the baseline (A) and what is studied (B).
ABLATION_MODELS: dict[str, tuple[PublishedModel, PublishedModel]] = {
    "4-small": (
        _arm("Small MoE Baseline", _SMALL, 0.729, 39.0, 50.0, 39.2, 56.9, 22.7, 20.7, 35.8, 25.4, 10.7),
        _arm("Small MoE w/ MTP", _SMALL, 0.729, 41.4, 53.3, 41.3, 57.7, 22.3, 26.8, 36.8, 31.4, 12.6),
    ),
    "4-large": (
        _arm("Large MoE Baseline", _LARGE_4, 0.658, 70.0, 67.5, 68.5, 67.0, 27.2, 44.5, 61.6, 72.3, 38.6),
        _arm("Large MoE w/ MTP", _LARGE_4, 0.657, 70.7, 66.6, 70.6, 67.3, 28.5, 53.7, 62.2, 74.0, 39.8),
    ),
    "5-small": (
        _arm("Small MoE Aux-Loss-Based", _SMALL, 0.727, 37.3, 51.0, 38.1, 58.3, 23.2, 22.0, 36.6, 27.1, 10.9),
        _arm("Small MoE Aux-Loss-Free", _SMALL, 0.724, 39.3, 51.8, 39.0, 58.5, 23.4, 22.6, 35.8, 29.6, 11.1),
    ),
    "5-large": (
        _arm("Large MoE Aux-Loss-Based", _LARGE_5, 0.656, 66.7, 68.3, 67.1, 66.7, 27.1, 40.2, 59.2, 70.7, 37.2),
        _arm("Large MoE Aux-Loss-Free", _LARGE_5, 0.652, 67.9, 67.2, 67.1, 67.7, 28.1, 46.3, 61.2, 74.5, 39.6),
    ),
}
