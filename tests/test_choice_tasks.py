"""The choice and bits-per-byte tasks through lm-eval: prompts, shots, scores, groups.

Records are look-alikes by default (`choice_records`); those of the data sets may not be copied, so the tests on them
need the folder that LIGHTNING_DSV3_DATA names.
"""

import math
import os
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import choice_records as records
import datasets
import pytest
import torch
import yaml
from choice_runs import FOLDER, evaluate, knowing, manager_of, mistaken, replace_hub, run, scores_of, shortest
from conftest import ROOT
from lm_eval.tasks._yaml_loader import load_yaml
from tiny_model import tiny_model

from lightning_dsv3.data import load_tokenizer
from lightning_dsv3.evaluation import data
from lightning_dsv3.evaluation.choice_tasks import macro_mean, score_halves, score_letters, score_texts
from lightning_dsv3.evaluation.data_subjects import CEVAL, CMMLU, MMLU, MMMLU
from lightning_dsv3.evaluation.likelihood import Likelihood
from lightning_dsv3.evaluation.lm import DSV3LM

GOLDEN = ROOT / "tests" / "golden" / "prompts"
LOCALES = [f"dsv3_mmmlu_{language.lower()}" for language in MMMLU]
LETTERS = ["dsv3_mmlu", "dsv3_mmlu_redux", "dsv3_mmlu_redux_all", "dsv3_mmlu_redux_corrected", "dsv3_mmlu_pro"]
LETTERS += ["dsv3_arc_easy", "dsv3_arc_challenge", "dsv3_ceval", "dsv3_cmmlu", *LOCALES]
TEXTS = ["dsv3_hellaswag", "dsv3_piqa", "dsv3_winogrande", "dsv3_race_middle", "dsv3_race_high", "dsv3_c3", "dsv3_ccpm"]
TEXTS += [f"dsv3_{name}_cloze" for name in ("mmlu", "arc_easy", "arc_challenge", "ceval", "cmmlu", "c3")]
CHOICE = [*LETTERS, *TEXTS]
# Table 3; a cloze form has the shots of the report's form.
SHOTS = {"hellaswag": 10, "piqa": 0, "winogrande": 5, "race": 5, "arc": 25, "c3": 0, "ccpm": 0, "pile": 0}
SHOTS |= {"mmlu": 5, "mmmlu": 5, "ceval": 5, "cmmlu": 5}
CHINESE = ("dsv3_ceval", "dsv3_cmmlu", "dsv3_c3", "dsv3_ccpm")


@pytest.fixture(scope="module")
def manager():
    return manager_of()


@pytest.fixture
def hub(monkeypatch):
    return replace_hub(monkeypatch)


@pytest.fixture(scope="module")
def runs(manager):
    """One run in which the model knows the answers and one in which it prefers the others."""
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        return evaluate(manager, CHOICE, knowing), evaluate(manager, CHOICE, mistaken)


# The YAML files


def test_every_yaml_file_is_in_the_index(manager):
    """lm-eval skips a file that it cannot read without a word."""
    names = [
        load_yaml(path, resolve_func=False).get(key) for path in FOLDER.glob("**/*.yaml") for key in ("task", "group")
    ]
    tasks = {name for name in names if isinstance(name, str) and name.startswith("dsv3_")}
    assert {*CHOICE, "dsv3_pile_test"} <= tasks
    assert tasks == set(manager.all_tasks)


def test_no_two_files_give_one_name():
    named = Counter()
    for path in FOLDER.glob("**/*.yaml"):
        config = load_yaml(path, resolve_func=False)
        named[config["group"] if "group" in config else config.get("task")] += 1
    del named[None]  # what is only included
    assert set(named.values()) == {1}


@pytest.mark.parametrize("task", CHOICE)
def test_shots_delimiter_and_description_are_those_of_the_protocol(runs, task):
    (results, _), _ = runs
    config = results["configs"][task]
    name = next(name for name in sorted(SHOTS, key=len, reverse=True) if task.startswith(f"dsv3_{name}"))
    assert results["n-shot"][task] == SHOTS[name]
    assert config["target_delimiter"] == ("" if task.startswith(CHINESE) else " ")
    assert len(config["metadata"]["description"]) > 80
    assert ("neutral_context" in config["metadata"]) == task.startswith("dsv3_arc")
    entry = data.BENCHMARKS[config["metadata"]["benchmark"]]
    assert entry.shots == SHOTS[name]
    assert config["metric_list"][0]["metric"] == entry.metric


@pytest.mark.parametrize("task", CHOICE)
def test_who_knows_the_answers_has_1_and_who_prefers_the_others_0(runs, task):
    right, wrong = (scores_of(results["results"][task]) for results, _ in runs)
    declared = {entry["metric"] for entry in runs[0][0]["configs"][task]["metric_list"]}
    assert set(right) == set(wrong) == declared
    assert {right[name] for name in declared - {"bpb"}} == {1.0}
    assert {wrong[name] for name in declared - {"bpb"}} == {0.0}
    assert ("bpb" in declared) == (task in TEXTS)
    assert ("acc_uncond" in declared) == task.startswith("dsv3_arc")


# Prompts


def rendered(requests, task):
    """The prompt of one of a task's records and its options, ends marked."""
    number = 2 if "race" in task else 0  # the first question of an article has no shots
    chosen = [request for request in requests[task] if request.doc_id == number]
    contexts = list(dict.fromkeys(request.args[0] for request in chosen))
    options = list(dict.fromkeys(request.args[1] for request in chosen))
    return "".join(f"{text}<END>\n" for text in [*contexts, *options])


@pytest.mark.parametrize("task", CHOICE)
def test_prompt_is_the_golden_one(runs, task):
    path = GOLDEN / f"{task}.txt"
    assert path.exists(), f"write it with: python tests/{Path(__file__).name}"
    assert rendered(runs[0][1], task) == path.read_text(encoding="utf-8")


def lm_eval_requests(monkeypatch, path, overrides, splits, num_fewshot):
    """The requests of a task file of lm-eval's on given records."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    config = load_yaml(Path(tasks.__file__).parent / path)
    for key in ("tag", "group"):
        config.pop(key, None)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda **_: {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    task = ConfigurableTask(config={**config, **overrides, "num_fewshot": num_fewshot})
    task.set_fewshot_seed(0)
    task.build_all_requests()
    return [request.args for request in task.instances]


@pytest.mark.parametrize("subject", ["abstract_algebra", "high_school_us_history", "world_religions"])
def test_mmlu_is_lm_evals_own(runs, monkeypatch, subject):
    ours = [request.args for request in runs[0][1]["dsv3_mmlu"] if request.doc["subject"] == subject]
    splits = {
        name: [row for row in rows if row["subject"] == subject]
        for name, rows in (("test", records.MMLU_TEST), ("dev", records.MMLU_DEV))
    }
    assert ours == lm_eval_requests(monkeypatch, f"mmlu/default/mmlu_{subject}.yaml", {}, splits, 5)


@pytest.mark.parametrize(
    ("name", "path", "splits"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml", records.HELLASWAG),
        ("winogrande", "winogrande/default.yaml", records.WINOGRANDE),
    ],
    ids=["hellaswag", "winogrande"],
)
def test_hellaswag_and_winogrande_are_lm_evals_own(runs, monkeypatch, name, path, splits):
    ours = [request.args for request in runs[0][1][f"dsv3_{name}"]]
    first = {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    assert ours == lm_eval_requests(monkeypatch, path, first, splits, SHOTS[name])


def test_race_has_the_questions_before_it_of_the_same_article(runs):
    contexts = list(dict.fromkeys(request.args[0] for request in runs[0][1]["dsv3_race_middle"]))
    assert [context.count("\n\nA:") - 1 for context in contexts] == [0, 1, 2, 3, 4, 5, 5, 0]
    assert all(context.count("Article:") == 1 for context in contexts)
    assert "question 0?\n\nA: Lutz middle 0 w\n\nQ:" in contexts[1]
    assert "question 4?" in contexts[6]
    assert "question 5?" not in contexts[6]  # the first five, so that prompts of one article begin alike
    assert "Ober" not in "".join(contexts[:7])


def test_shots_of_a_subject_are_its_own(runs):
    for task, subjects in (
        ("dsv3_mmlu", MMLU),
        ("dsv3_mmlu_redux", MMLU),
        ("dsv3_cmmlu", CMMLU),
        ("dsv3_ceval", CEVAL),
    ):
        requests = runs[0][1][task]
        assert {request.doc["subject"] for request in requests} == set(subjects)
        marker = "in the {}" if "mmlu" in task and task != "dsv3_cmmlu" else "{}第"
        for request in requests:
            own = marker.format(request.doc["subject"]) + (" of" if "in the" in marker else "")
            assert request.args[0].count(own) == 6


def test_mmmlu_shots_are_the_first_other_questions_of_the_subject(runs):
    requests = runs[0][1]["dsv3_mmmlu_sw_ke"]
    for request in requests:
        number, subject = request.doc["text"].partition("?")[0].split()[-1], request.doc["subject"]
        expected = [str(n) for n in range(7) if str(n) != number][:5]
        shown = [line for line in request.args[0].splitlines() if line.endswith("?")]
        assert shown == [f"SW_KE: {subject} {n}?" for n in [*expected, number]]


def test_any_limit_sees_all_subjects(hub, manager):
    results, requests = evaluate(manager, ["dsv3_mmlu"], knowing, limit=len(MMLU))
    assert {request.doc["subject"] for request in requests["dsv3_mmlu"]} == set(MMLU)
    assert results["n-samples"]["dsv3_mmlu"]["effective"] == len(MMLU)


def test_num_fewshot_of_the_command_line_is_honoured(hub, manager):
    _, requests = evaluate(manager, ["dsv3_mmlu", "dsv3_hellaswag", "dsv3_race_high"], knowing, num_fewshot=2)
    assert {request.args[0].count("Answer: ") for request in requests["dsv3_mmlu"]} == {2}
    assert {request.args[0].count("Mending nets") for request in requests["dsv3_hellaswag"]} == {3}
    assert max(request.args[0].count("\n\nA: ") for request in requests["dsv3_race_high"]) == 2


def test_more_shots_than_there_are_is_an_error(hub, manager):
    with pytest.raises(ValueError, match="num_fewshot=6: there are 5 worked examples 'abstract_algebra'"):
        evaluate(manager, ["dsv3_mmlu"], knowing, num_fewshot=6)


def test_a_seed_draws_other_shots_and_the_same_ones_again(hub, runs):
    tasks = ["dsv3_mmlu", "dsv3_arc_easy", "dsv3_winogrande"]
    pinned = runs[0][1]
    _, first = evaluate(manager_of(fewshot_seed=1), tasks, knowing)
    _, again = evaluate(manager_of(fewshot_seed=1), tasks, knowing)
    _, other = evaluate(manager_of(fewshot_seed=2), tasks, knowing)
    for task in tasks:
        prompts = [[request.args for request in run[task]] for run in (pinned, first, again, other)]
        assert prompts[1] == prompts[2]
        assert prompts[0] != prompts[1] != prompts[3]
        assert [request.doc["answer"] for request in first[task]] == [request.doc["answer"] for request in pinned[task]]
    with pytest.raises(ValueError, match="fewshot_seed must be a whole number, not 'x'"):
        manager_of(fewshot_seed="x").load("dsv3_mmlu")


def test_redux_rows(runs):
    counts = {name: Counter() for name in ("", "_all", "_corrected")}
    golds = {}
    for name, count in counts.items():
        for request in runs[0][1][f"dsv3_mmlu_redux{name}"]:
            count[request.doc["subject"]] += not request.idx
            golds[name, request.doc["text"]] = request.doc["answer"]
    assert [set(count.values()) for count in counts.values()] == [{2}, {4}, {3}]
    wrong = next(text for name, text in golds if name == "_all" and "is 1 + 1 in the virology" in text)
    assert golds["_all", wrong] == 2
    assert golds["_corrected", wrong] == 2  # the annotators' "2"
    assert ("", wrong) not in golds


# Scores


def pair(value, tokens, context=-3.0, context_tokens=4):
    return Likelihood(value, False, num_tokens=tokens, context_logprob=context, context_tokens=context_tokens)


def test_scores_are_those_of_the_formulas():
    document = {"choices": ["aa", "bbbbbbbbbb", "cccc", "ß"], "answer": 0}
    sums, tokens, context, neutral = (
        [-3.0, -4.0, -2.5, -9.0],
        [1, 2, 1, 5],
        [-3.0, -1.0, -3.0, -40.0],
        [-9.0, -1.0, -3.0, -9.5],
    )
    results = [pair(*one) for one in zip(sums, tokens, context, strict=True)] + [pair(value, 1) for value in neutral]
    scores = score_texts(document, results)

    def best(values):
        return max(range(4), key=lambda index: values[index])

    assert best(sums) == 2
    assert best([a / len(b) for a, b in zip(sums, document["choices"], strict=True)]) == 1
    assert best([a / b for a, b in zip(sums, tokens, strict=True)]) == 3
    assert best([a - b for a, b in zip(sums, neutral, strict=True)]) == 0
    assert best([(a + c) / (b + 4) for a, b, c in zip(sums, tokens, context, strict=True)]) == 1
    expected = {"acc": 2, "acc_norm": 1, "acc_ppl": 3, "acc_uncond": 0, "acc_ppl_full": 1}
    for answer in range(4):
        scores = score_texts({**document, "answer": answer}, results)
        assert {name: scores[name] for name in expected} == {name: float(answer == at) for name, at in expected.items()}
    assert scores["bpb"] == pytest.approx(9.0 / math.log(2) / 2)  # the last option has two bytes


def test_a_model_without_counts_of_tokens_is_measured_by_bytes():
    document = {"choices": ["磨坊", "mill"], "answer": 0}  # six bytes in two characters, four in four
    scores = score_texts(document, [(-5.0, False), (-4.0, False)])
    assert (scores["acc"], scores["acc_norm"], scores["acc_ppl"]) == (0.0, 0.0, 1.0)
    assert "acc_ppl_full" not in scores
    assert "acc_uncond" not in scores


def test_no_form_of_the_whole_sequence_where_the_context_was_not_scored():
    unscored = [pair(-1.0, 1, None, 0), pair(-2.0, 1, None, 0)]
    assert "acc_ppl_full" not in score_letters({"choices": ["A", "B"], "answer": 0}, unscored)


def test_letters_have_no_bits_per_byte_and_subjects_a_macro_mean():
    scores = score_letters({"choices": ["A", "B"], "answer": 1, "subject": "law"}, [pair(-1.0, 1), pair(-2.0, 1)])
    assert "bpb" not in scores
    assert scores["acc_ppl_macro"] == ("law", 0.0)
    assert macro_mean([("law", 0.0), ("law", 1.0), ("law", 1.0), ("art", 0.0)]) == pytest.approx(1 / 3)


def test_halves_are_measured_by_what_follows_the_gap():
    document = {"choices": ["The old long name", "X"], "text": "four", "answer": 1}
    scores = score_halves(document, [(-4.0, False), (-3.0, False)])
    assert (scores["acc"], scores["acc_norm"], scores["acc_ppl"]) == (1.0, 1.0, 1.0)
    assert scores["bpb"] == pytest.approx(3.0 / math.log(2) / 4)


def test_our_model_is_measured_as_the_formulas_say(hub, manager):
    """Every likelihood again from the model's own logits."""
    tokenizer, weights = load_tokenizer(512), tiny_model(vocab_size=512, std=0.12, max_position_embeddings=512)
    model = DSV3LM(model=weights, tokenizer=tokenizer, max_length=512)
    results = run(manager, model, ["dsv3_c3"], log_samples=True)
    samples = {sample["doc_id"]: sample for sample in results["samples"]["dsv3_c3"]}
    assert len(samples) == len(records.C3)
    for number, row in enumerate(records.C3):
        own, whole = [], []
        context = prompt_of(row)
        for option in row["choice"]:
            tokens = model.tok_encode(context + option)
            first = len(model.tok_encode(context))
            with torch.no_grad():
                logits = weights(torch.tensor([tokens])).logits[0].double()
            logprobs = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
            own.append(float(logprobs[first - 1 :].mean()))
            whole.append(float(logprobs.mean()))
        gold = row["choice"].index(row["answer"])
        assert samples[number]["acc_ppl"] == float(max(range(len(own)), key=own.__getitem__) == gold)
        assert samples[number]["acc_ppl_full"] == float(max(range(len(whole)), key=whole.__getitem__) == gold)


def prompt_of(row):
    return "\n".join(row["context"]) + f"\n\n请根据上文回答问题：\n\n{row['question']}\n答案："


def test_arc_asks_for_each_option_after_the_prompt_and_after_answer(runs):
    for task in ("dsv3_arc_easy", "dsv3_arc_challenge_cloze"):
        by_document = defaultdict(list)
        for request in runs[0][1][task]:
            by_document[request.doc_id].append(request)
        for requests in by_document.values():
            count = len(requests) // 2
            assert [request.idx for request in requests] == list(range(2 * count))
            assert [request.args[0] for request in requests[count:]] == ["Answer:"] * count
            assert [request.args[1] for request in requests[count:]] == [
                request.args[1] for request in requests[:count]
            ]
            assert {request.args[0] for request in requests[:count]} & {"Answer:"} == set()


def test_bits_per_byte_are_over_all_bytes(hub, manager):
    texts = {"pile_cc": [], "github": [], "gutenberg_pg_19": []}
    for row in records.PILE:
        name = {"Pile-CC": "pile_cc", "Github": "github"}.get(row["meta"]["pile_set_name"], "gutenberg_pg_19")
        texts[name] += [row["text"]] if row["text"] else []
    results, requests = evaluate(manager, ["dsv3_pile_test"], lambda request: -2.0 * len(request.args[0]) ** 1.5)
    assert [request.args for request in requests["dsv3_pile_test"]] == [
        (row["text"],) for row in records.PILE if row["text"]
    ]

    golden = (GOLDEN / "dsv3_pile_test.txt").read_text(encoding="utf-8")
    assert requests["dsv3_pile_test"][0].args[0] + "<END>\n" == golden

    def expected(chosen):
        nats = sum(2.0 * len(text) ** 1.5 for text in chosen)
        return nats / math.log(2) / sum(len(text.encode()) for text in chosen)

    scores = scores_of(results["results"]["dsv3_pile_test"])
    assert scores.pop("bits_per_byte") == pytest.approx(expected([text for found in texts.values() for text in found]))
    assert scores == {f"bits_per_byte_{name}": pytest.approx(expected(found)) for name, found in texts.items()}
    assert {f"bits_per_byte_{name}" for name in texts} < {
        entry["metric"] for entry in results["configs"]["dsv3_pile_test"]["metric_list"]
    }
    assert results["n-samples"]["dsv3_pile_test"]["effective"] == 4  # the empty document has nothing to score


def test_a_result_can_be_written(runs, tmp_path):
    from lm_eval.loggers import EvaluationTracker

    results, _ = runs[0]
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = "m"
    tracker.save_results_aggregated(results={**results, "samples": {}}, samples={})
    assert list(tmp_path.glob("**/*.json"))


# On the real records

REAL = pytest.mark.skipif(
    not os.environ.get("LIGHTNING_DSV3_DATA"), reason="needs the benchmarks' own files: set LIGHTNING_DSV3_DATA"
)


@REAL
@pytest.mark.parametrize(("task", "expected"), [("dsv3_ccpm", 0.26066), ("dsv3_c3", 0.24188)])
def test_reference_score_of_one_who_prefers_short_options(manager, task, expected):
    if not data.found(task.removeprefix("dsv3_")):
        pytest.skip(f"no {task} in LIGHTNING_DSV3_DATA")
    results, _ = evaluate(manager, [task], shortest)
    assert results["results"][task]["acc,none"] == pytest.approx(expected, abs=5e-6)


@REAL
@pytest.mark.parametrize("task", CHOICE)
def test_real_records_go_through(manager, task):
    config = yaml.safe_load(
        next(FOLDER.glob(f"*/{task.removeprefix('dsv3_')}.yaml")).read_text().replace("!function ", "")
    )
    metadata = config["metadata"]
    if not data.found(metadata["benchmark"], metadata.get("subset")):
        pytest.skip(f"no {task} in LIGHTNING_DSV3_DATA")
    results, requests = evaluate(manager, [task], knowing, limit=40)
    assert results["results"][task]["acc_ppl,none"] == 1.0
    for request in requests[task]:
        assert request.args[1].strip()
        assert request.args[0].strip()


@REAL
@pytest.mark.parametrize("task", CHOICE)
def test_gold_scores_1_and_another_option_0_on_every_record_at_hand(manager, task):
    metadata = load_yaml(next(FOLDER.glob(f"*/{task.removeprefix('dsv3_')}.yaml")), resolve_func=False)["metadata"]
    if not data.found(metadata["benchmark"], metadata.get("subset")):
        pytest.skip(f"no {task} in LIGHTNING_DSV3_DATA")
    loaded = manager.load(task)["tasks"][task]
    count = 0
    for document in loaded.test_docs().to_list():
        options = range(len(document["choices"]) * (2 if "neutral_context" in metadata else 1))
        asked = [SimpleNamespace(idx=index, doc=document) for index in options]
        for model, score in ((knowing, 1.0), (mistaken, 0.0)):
            scores = loaded.process_results(document, [model(request) for request in asked])
            scores.pop("bpb", None)
            if "acc_ppl_macro" in scores:
                _, scores["acc_ppl_macro"] = scores["acc_ppl_macro"]
            assert set(scores.values()) == {score}, (task, document["id"], scores)
        count += 1
    assert count >= 100


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        prompts = evaluate(manager_of(), CHOICE, knowing)[1]
        prompts |= evaluate(manager_of(), ["dsv3_pile_test"], lambda request: -1.0)[1]
    (GOLDEN / "dsv3_pile_test.txt").write_text(prompts["dsv3_pile_test"][0].args[0] + "<END>\n", encoding="utf-8")
    for task in CHOICE:
        (GOLDEN / f"{task}.txt").write_text(rendered(prompts, task), encoding="utf-8")
