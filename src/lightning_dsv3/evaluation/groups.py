"""The groups of tasks: which tasks they have, and which of them run with the data at hand.

lm-eval loads every task of a group and stops at the first whose data are missing. So the YAML file of a group gets its
list from here (``task: !function lightning_dsv3.evaluation.groups.dsv3_zh``), anew each time it is loaded: the tasks
whose data are at hand, with a warning that names the others. ``dsv3_zh_alias`` is the name that tables show; it says
``partial`` where not all are there. A task that a user names gets no such grace: it is an error that names the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning_dsv3.evaluation.data import BENCHMARKS, WAY_OUT, DataError, coverage, data_folder, found
from lightning_dsv3.evaluation.data_subjects import MGSM, MMMLU

_log = logging.getLogger(__name__)

_ENGLISH = """
    pile_test bbh mmlu mmlu_redux mmlu_pro drop arc_easy arc_challenge hellaswag piqa winogrande race_middle race_high
    triviaqa naturalquestions agieval
""".split()  # noqa: SIM905
_CODE = ["humaneval", "mbpp", "livecodebench", "cruxeval_i", "cruxeval_o"]
_MATH = ["gsm8k", "math", "mgsm", "cmath"]
_CHINESE = ["cluewsc", "ceval", "cmmlu", "cmrc", "c3", "ccpm"]

# As Table 3 has them; MGSM stands under mathematics there and is multilingual too.
GROUPS: dict[str, list[str]] = {
    "dsv3_base": [*_ENGLISH, *_CODE, *_MATH, *_CHINESE, "mmmlu"],
    "dsv3_en": _ENGLISH,
    "dsv3_code": _CODE,
    "dsv3_math": _MATH,
    "dsv3_zh": _CHINESE,
    "dsv3_multilingual": ["mmmlu", "mgsm"],
    "dsv3_ablation": [
        "pile_test",
        "bbh",
        "mmlu",
        "drop",
        "triviaqa",
        "naturalquestions",
        "humaneval",
        "mbpp",
        "gsm8k",
        "math",
    ],
    # What tells the progress of a model for which letters are beyond it.
    "dsv3_small": [
        "mmlu_cloze",
        "arc_easy_cloze",
        "arc_challenge_cloze",
        "cmmlu_cloze",
        "ceval_cloze",
        "c3_cloze",
    ],
    "dsv3_mmmlu": [f"mmmlu_{language.lower()}" for language in MMMLU],
    "dsv3_mgsm": [f"mgsm_{language}" for language in MGSM],
}
# Where they are not the tasks' own: tables 4 and 5 have DROP with one shot; the contexts of small models are short.
_SHOTS = {"dsv3_ablation": {"drop": 1}, "dsv3_small": dict.fromkeys(GROUPS["dsv3_small"], 0)}


def benchmark_of(leaf: str) -> tuple[str, str | None]:
    """Return the benchmark of a task, and the subset of which it is, if it is of one.

    >>> benchmark_of("arc_easy_cloze"), benchmark_of("mgsm_de")
    (('arc_easy', None), ('mgsm', 'de'))
    """
    leaf = leaf.removesuffix("_cloze")
    if leaf in BENCHMARKS:
        return leaf, None
    benchmark, _, language = leaf.partition("_")
    return benchmark, next(name for name in BENCHMARKS[benchmark].subsets if name.lower() == language)


def tasks(group: str) -> list[str | dict[str, Any]]:
    """Return the tasks of a group that run with the data at hand, as lm-eval takes them.

    Raises:
        DataError: If there is none.
    """
    leaves = GROUPS[group]
    present = [leaf for leaf in leaves if found(*benchmark_of(leaf))]
    if absent := [leaf for leaf in leaves if leaf not in present]:
        listed = "\n".join(f"  {task_name(leaf)}: {coverage(*benchmark_of(leaf)).missing}" for leaf in absent)
        if not present:
            where, way_out = data_folder() or "the hub's cache", "" if data_folder() else f"\n{WAY_OUT}"
            raise DataError(f"{group}: none of its tasks has its data in {where}:\n{listed}{way_out}")
        _log.warning(
            "%s: %d of %d tasks are absent, its score is partial:\n%s", group, len(absent), len(leaves), listed
        )
    shots = _SHOTS.get(group, {})
    return [
        {"task": task_name(leaf), "num_fewshot": shots[leaf]} if leaf in shots else task_name(leaf) for leaf in present
    ]


def task_name(leaf: str) -> str:
    """Return the name of a benchmark's task.

    >>> task_name("mmlu"), task_name("math")
    ('dsv3_mmlu', 'dsv3_hendrycks_math')
    """
    return "dsv3_hendrycks_math" if leaf == "math" else f"dsv3_{leaf}"  # the group of mathematics is dsv3_math


def alias(group: str) -> str:
    """Return the name that tables show: the group's own, and how much of it is at hand."""
    leaves = GROUPS[group]
    states = [coverage(*benchmark_of(leaf)) for leaf in leaves]
    num_present = sum(bool(state.present) for state in states)
    if num_present < len(leaves):
        return f"{group} (partial: {num_present} of {len(leaves)})"
    return f"{group} (partial)" if any(state.absent for state in states) else group


def is_indexed(member: object, index: Mapping[str, Any]) -> bool:
    """Tell whether an index of lm-eval has a task or group with all its members, without loading any.

    Args:
        member: A name, or what stands in a group's list: a task with changes, or a group written out.
        index: Names and entries, as ``TaskManager.task_index``. A group of ours has none but ours.
    """
    if isinstance(member, dict):
        inner = member.get("task")
        return all(is_indexed(part, index) for part in (inner if isinstance(inner, list) else [inner]))
    if not isinstance(member, str) or member not in index:
        return False
    inner = (index[member].cfg or {}).get("task")
    return not isinstance(inner, list) or all(is_indexed(part, index) for part in inner)


def __getattr__(name: str) -> Any:
    if name in GROUPS:
        return tasks(name)
    if name.removesuffix("_alias") in GROUPS:
        return alias(name.removesuffix("_alias"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
