"""What the benchmarks of the report's Table 3 are and where their records lie: the table behind ``dsv3 eval --list``.

Shots, methods and metrics are Table 3's. Licences are as stated by whoever publishes the data; many are non-commercial
or unclear, so the package ships none of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lightning_dsv3.evaluation import data_generation_records as generation
from lightning_dsv3.evaluation import data_records as choice
from lightning_dsv3.evaluation import data_subjects as names
from lightning_dsv3.evaluation.data_records import Record, Row


@dataclass(frozen=True)
class Hub:
    """Rows of a data set on the hub; ``{subset}`` in a name stands for the subset.

    Args:
        path: The data set.
        split: Its split.
        config: Its configuration, or several that are joined.
        files: Files of the split, for data sets that name none.
        column: The column that names the subset, where all subsets are one configuration.
        rows: Which rows to take, in this order.
    """

    path: str
    split: str = "test"
    config: str | Sequence[str] | None = None
    files: Sequence[str] = ()
    column: str | None = None
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class Split:
    """One part of a benchmark.

    Args:
        hub: Where it is by default.
        files: Beginnings of the names of its files in the local folder, each a part of the split; ``a|b`` is ``b``
            where there is no ``a``.
        read: Makes records of a published one.
        keep: Which records belong to the split.
        labels: Beginning of the names of files (``.lst``) with one label a line, where labels are apart.
        stand_in: Beginning of the names of files that are of another split: a score that rests on them is marked.
    """

    hub: Hub
    files: Sequence[str]
    read: Callable[[Row], Iterator[Record]]
    keep: Callable[[Record], bool] | None = None
    labels: str | None = None
    stand_in: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One line of the table.

    Args:
        title: Its name in the report.
        method: ``perplexity``, ``generation`` or ``bits per byte``.
        metric: The headline metric of its task.
        shots: Worked examples in the prompt.
        licence: Of the data.
        folder: Its folder below the one that LIGHTNING_DSV3_DATA names.
        test: What is scored.
        pool: Where worked examples come from; none where they are records of ``test``, or no records.
        subsets: Subjects, languages or exams that are files or configurations of their own.
        size: Records of the whole of ``test`` (of each language, where it has several), where known.
        pool_of: The benchmark whose pool is taken.
        others: Beginnings of the names of files that lie beside these and belong to neither part.
        needs_pool: Where the pool is not at hand, no shots can be other records of ``test``.
    """

    title: str
    method: str
    metric: str
    shots: int
    licence: str
    folder: str
    test: Split
    pool: Split | None = None
    subsets: Sequence[str] = ()
    size: int | None = None
    pool_of: str | None = None
    others: Sequence[str] = ()
    needs_pool: bool = True


_PPL, _GEN = "perplexity", "generation"


def _arc(difficulty: str, size: int) -> Benchmark:
    config, stem = f"ARC-{difficulty}", f"arc_{difficulty.lower()}"
    return Benchmark(
        config,
        _PPL,
        "acc_uncond",
        25,
        "CC BY-SA 4.0",
        "arc",
        Split(Hub("allenai/ai2_arc", config=config), [f"{stem}.test|{config}-Test"], choice.arc),
        Split(Hub("allenai/ai2_arc", "train", config), [f"{stem}.train|{config}-Train"], choice.arc),
        size=size,
        needs_pool=False,
    )


def _race(level: str, size: int) -> Benchmark:
    test = Split(
        Hub("ehovy/race", config=level),
        [f"test.{level}|test/{level}|validation.{level}"],
        choice.race,
        stand_in=f"validation.{level}",
    )
    return Benchmark(f"RACE-{level.title()}", _PPL, "acc_ppl", 5, "research only", "race", test, size=size)


def _cruxeval(letter: str) -> Benchmark:
    test = Split(Hub("cruxeval-org/cruxeval"), ["cruxeval|test"], generation.cruxeval)
    return Benchmark(f"CRUXEval-{letter}", _GEN, "pass@1", 2, "MIT", "cruxeval", test, size=800)


# The report's LiveCodeBench-Base is restricted to "0801-1101".
_WINDOW = ("2024-08-01", "2024-11-01")
_GSM8K_SHOTS = (6931, 5146, 3040, 7236, 1915, 1856, 150, 440)
_NQ, _TRIVIA, _MBPP = "google-research-datasets/nq_open", "mandarjoshi/trivia_qa", "google-research-datasets/mbpp"
_CCPM = "https://raw.githubusercontent.com/THUNLP-AIPoet/CCPM/HEAD/valid.jsonl"
_LCB = "hf://datasets/livecodebench/code_generation_lite"

BENCHMARKS: dict[str, Benchmark] = {
    "pile_test": Benchmark(
        "Pile-test",
        "bits per byte",
        "bits_per_byte",
        0,
        "mixed; copyrighted parts",
        "pile",
        Split(Hub("monology/pile-test-val", files=["test.jsonl.zst"]), ["test"], choice.pile),
    ),
    "bbh": Benchmark(
        "BBH",
        _GEN,
        "exact_match",
        3,
        "MIT",
        "bbh",
        Split(Hub("SaylorTwift/bbh", config="{subset}"), ["bbh/{subset}|{subset}"], generation.bbh),
        subsets=names.BBH,
        size=6511,
    ),
    "mmlu": Benchmark(
        "MMLU",
        _PPL,
        "acc_ppl",
        5,
        "MIT",
        "mmlu",
        Split(Hub("cais/mmlu", config="all", column="subject"), ["test/{subset}_test"], choice.mmlu),
        Split(Hub("cais/mmlu", "dev", "all", column="subject"), ["dev/{subset}_dev"], choice.mmlu),
        subsets=names.MMLU,
        size=14042,
    ),
    "mmlu_redux": Benchmark(
        "MMLU-Redux",
        _PPL,
        "acc_ppl",
        5,
        "CC BY 4.0",
        "mmlu_redux",
        Split(Hub("edinburgh-dawg/mmlu-redux-2.0", config="{subset}"), ["mmlu_{subset}|{subset}"], choice.mmlu_redux),
        subsets=names.MMLU,
        size=5700,
        pool_of="mmlu",
    ),
    "mmlu_pro": Benchmark(
        "MMLU-Pro",
        _PPL,
        "acc_ppl",
        5,
        "MIT",
        "mmlu_pro",
        Split(Hub("TIGER-Lab/MMLU-Pro"), ["test"], choice.mmlu_pro),
        Split(Hub("TIGER-Lab/MMLU-Pro", "validation"), ["validation"], choice.mmlu_pro),
        size=12032,
    ),
    "mmmlu": Benchmark(
        "MMMLU-non-English",
        _PPL,
        "acc_ppl",
        5,
        "MIT",
        "mmmlu",
        Split(Hub("openai/MMMLU", config="{subset}"), ["mmlu_{subset}|test/mmlu_{subset}|{subset}"], choice.mmmlu),
        subsets=names.MMMLU,
        size=14042,
    ),
    "drop": Benchmark(
        "DROP",
        _GEN,
        "f1",
        3,
        "CC BY-SA 4.0",
        "drop",
        Split(Hub("EleutherAI/drop", "validation"), ["drop_dataset_dev|validation|dev"], generation.drop),
        size=9536,
    ),
    "arc_easy": _arc("Easy", 2376),
    "arc_challenge": _arc("Challenge", 1172),
    "hellaswag": Benchmark(
        "HellaSwag",
        _PPL,
        "acc_ppl",
        10,
        "MIT",
        "hellaswag",
        Split(Hub("Rowan/hellaswag", "validation"), ["hellaswag_val|validation|val"], choice.hellaswag),
        Split(Hub("Rowan/hellaswag", "train"), ["hellaswag_train|train"], choice.hellaswag),
        size=10042,
        needs_pool=False,
    ),
    "piqa": Benchmark(
        "PIQA",
        _PPL,
        "acc_ppl",
        0,
        "AFL 3.0 (unverified)",
        "piqa",
        Split(Hub("baber/piqa", "validation"), ["valid"], choice.piqa, labels="valid-labels"),
        size=1838,
    ),
    "winogrande": Benchmark(
        "WinoGrande",
        _PPL,
        "acc_ppl",
        5,
        "CC BY (unverified)",
        "winogrande",
        Split(Hub("allenai/winogrande", "validation", "winogrande_xl"), ["dev|validation"], choice.winogrande),
        Split(Hub("allenai/winogrande", "train", "winogrande_xl"), ["train_xl|train"], choice.winogrande),
        size=1267,
        needs_pool=False,
    ),
    "race_middle": _race("middle", 1436),
    "race_high": _race("high", 3498),
    "triviaqa": Benchmark(
        "TriviaQA",
        _GEN,
        "exact_match",
        5,
        "Apache 2.0 (unverified)",
        "triviaqa",
        Split(
            Hub(_TRIVIA, "validation", "rc.nocontext"),
            ["validation|wikipedia-dev|unfiltered-web-dev"],
            generation.triviaqa,
        ),
        Split(Hub(_TRIVIA, "train", "rc.nocontext"), ["train|wikipedia-train"], generation.triviaqa),
        size=17944,
    ),
    "naturalquestions": Benchmark(
        "NaturalQuestions",
        _GEN,
        "exact_match",
        5,
        "CC BY-SA 3.0",
        "nq_open",
        Split(Hub(_NQ, "validation"), ["NQ-open.dev|validation"], generation.naturalquestions),
        Split(
            Hub(_NQ, "train"),
            ["NQ-open.train|train|NQ-open.efficientqa.dev"],
            generation.naturalquestions,
            stand_in="NQ-open.efficientqa.dev",
        ),
        size=3610,
    ),
    "agieval": Benchmark(
        "AGIEval",
        _GEN,
        "acc",
        0,
        "MIT, and those of the exams",
        "agieval",
        Split(
            Hub("hails/agieval-{subset}"), ["{subset}"], generation.agieval, keep=lambda record: record["answer"] != ""
        ),
        subsets=names.AGIEVAL,
    ),
    "humaneval": Benchmark(
        "HumanEval",
        _GEN,
        "pass@1",
        0,
        "MIT",
        "humaneval",
        Split(Hub("openai/openai_humaneval"), ["HumanEval|test"], generation.humaneval),
        size=164,
    ),
    "mbpp": Benchmark(
        "MBPP",
        _GEN,
        "pass@1",
        3,
        "CC BY 4.0",
        "mbpp",
        Split(
            Hub(_MBPP, config="full"),
            ["mbpp|test"],
            generation.mbpp,
            keep=lambda record: 11 <= record["task_id"] <= 510,
        ),
        Split(
            Hub(_MBPP, "prompt", "full"), ["mbpp|prompt"], generation.mbpp, keep=lambda record: record["task_id"] < 11
        ),
        size=500,
    ),
    "livecodebench": Benchmark(
        "LiveCodeBench-Base",
        _GEN,
        "pass@1",
        3,
        "CC (unverified)",
        "livecodebench",
        Split(
            Hub("json", files=[f"{_LCB}/test4.jsonl", f"{_LCB}/test5.jsonl"]),
            ["test"],
            generation.livecodebench,
            keep=lambda record: _WINDOW[0] <= record["contest_date"][:10] <= _WINDOW[1],
        ),
    ),
    "cruxeval_i": _cruxeval("I"),
    "cruxeval_o": _cruxeval("O"),
    "gsm8k": Benchmark(
        "GSM8K",
        _GEN,
        "exact_match",
        8,
        "MIT",
        "gsm8k",
        Split(Hub("openai/gsm8k", config="main"), ["test"], generation.gsm8k),
        Split(
            Hub("openai/gsm8k", "train", "main", rows=_GSM8K_SHOTS), ["train.v2_report_8shots|train"], generation.gsm8k
        ),
        size=1319,
        others=["train_socratic", "test_socratic"],
    ),
    "math": Benchmark(
        "MATH",
        _GEN,
        "exact_match",
        4,
        "MIT",
        "math",
        Split(Hub("EleutherAI/hendrycks_math", config=names.MATH), ["test"], generation.math),
        size=5000,
    ),
    "mgsm": Benchmark(
        "MGSM",
        _GEN,
        "exact_match",
        8,
        "CC BY 4.0",
        "mgsm",
        Split(Hub("juletxara/mgsm", config="{subset}"), ["mgsm_{subset}"], generation.mgsm),
        Split(Hub("juletxara/mgsm", "train", "{subset}"), ["exemplars"], generation.mgsm_shots),
        subsets=names.MGSM,
        size=250,
    ),
    "cmath": Benchmark(
        "CMath",
        _GEN,
        "exact_match",
        3,
        "MIT or CC BY 4.0 (both are stated)",
        "cmath",
        Split(
            Hub("weitianwen/cmath", files=["cmath_test.jsonl"]),
            ["cmath_test|cmath_dev"],
            generation.cmath,
            stand_in="cmath_dev",
        ),
        Split(
            Hub("weitianwen/cmath", files=["cmath_dev.jsonl"], rows=(500, 501, 502)),
            ["cmath_dev.rows500-502|cmath_dev"],
            generation.cmath,
        ),
    ),
    "cluewsc": Benchmark(
        "CLUEWSC",
        _GEN,
        "exact_match",
        5,
        "none stated",
        "cluewsc",
        Split(
            Hub("clue/clue", "validation", "cluewsc2020"),
            ["dev_few_all|dev"],
            generation.cluewsc,
            stand_in="dev_few_all",
        ),
        Split(
            Hub("clue/clue", "train", "cluewsc2020"),
            ["train_few_all|train"],
            generation.cluewsc,
            stand_in="train_few_all",
        ),
    ),
    "ceval": Benchmark(
        "C-Eval",
        _PPL,
        "acc_ppl",
        5,
        "CC BY-NC-SA 4.0",
        "ceval",
        Split(Hub("ceval/ceval-exam", "val", "{subset}"), ["val/{subset}_val"], choice.ceval),
        Split(Hub("ceval/ceval-exam", "dev", "{subset}"), ["dev/{subset}_dev"], choice.ceval),
        subsets=tuple(names.CEVAL),
        size=1346,
    ),
    "cmmlu": Benchmark(
        "CMMLU",
        _PPL,
        "acc_ppl",
        5,
        "CC BY-NC-SA 4.0",
        "cmmlu",
        Split(Hub("haonan-li/cmmlu", config="{subset}"), ["test/{subset}"], choice.cmmlu),
        Split(Hub("haonan-li/cmmlu", "dev", "{subset}"), ["dev/{subset}"], choice.cmmlu),
        subsets=tuple(names.CMMLU),
    ),
    "cmrc": Benchmark(
        "CMRC 2018",
        _GEN,
        "exact_match",
        1,
        "CC BY-SA 4.0",
        "cmrc2018",
        Split(Hub("hfl/cmrc2018", "validation"), ["cmrc2018_dev|validation"], generation.cmrc),
        size=3219,
    ),
    "c3": Benchmark(
        "C3",
        _PPL,
        "acc_ppl",
        0,
        "non-commercial research",
        "c3",
        Split(Hub("clue/clue", "validation", "c3"), ["c3-m-dev", "c3-d-dev"], choice.c3),
        size=3816,
    ),
    "ccpm": Benchmark(
        "CCPM",
        _PPL,
        "acc_ppl",
        0,
        "none stated",
        "ccpm",
        Split(Hub("json", files=[_CCPM]), ["valid"], choice.ccpm),
        size=2720,
    ),
}
