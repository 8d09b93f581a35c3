"""``dsv3 report eval``: results as lm-eval writes them, the formats of a report, and mistakes."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from eval_results import LEAVES, ROWS, changed, column, lines_of, result, runner, section, tables, writer
from tiny_model import tiny_model

from lightning_dsv3 import plots
from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.cli import dsv3
from lightning_dsv3.data import load_tokenizer, save_tokenizer
from lightning_dsv3.evaluation import published_results as published
from lightning_dsv3.evaluation import report as reports
from lightning_dsv3.evaluation.result_files import ResultFile

TASKS = Path(reports.__file__).parent / "tasks"
V3 = published.BASE_MODELS["deepseek-v3"].scores


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


@pytest.fixture
def run(capsys):
    return runner(capsys)


# Results as lm-eval writes them


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of two models of ours on C3, and of another model of lm-eval on C3 and two languages of MGSM."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("real")
    data = folder / "data"
    questions = [
        [[f"\u7537\uff1a{number}"], [{"question": "?", "choice": ["\u5bb6", "b c"], "answer": "b c"}], str(number)]
        for number in range(24)
    ]
    exemplars = {
        language: {str(n): {"q": f"{question}: {n} + 1?", "a": f"{answer}: {n + 1}."} for n in range(1, 9)}
        for language, question, answer in (("de", "Frage", "Antwort"), ("en", "Question", "Answer"))
    }
    for name, content in {
        "c3/c3-d-dev.json": json.dumps(questions),
        "mgsm/exemplars.json": json.dumps({"MGSM_EXEMPLARS": exemplars}),
        "mgsm/mgsm_de.tsv": "1 + 1?\t2\n2 + 2?\t4\n",
        "mgsm/mgsm_en.tsv": "1 + 1?\t2\n2 + 2?\t4\n3 + 3?\t6\n",
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(content, encoding="utf-8")
    paths = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DSV3_DATA", str(data))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks every tool for its version
        for name, seed in {"ours": 0, "other seed": 1}.items():
            checkpoint = folder / name
            save_hf_checkpoint(tiny_model(seed, vocab_size=512, max_position_embeddings=256), checkpoint)
            save_tokenizer(load_tokenizer(512), checkpoint / "tokenizer.json")
            words = ["--checkpoint", checkpoint, "--tasks", "dsv3_c3", "--output", folder / "out" / name]
            assert dsv3.main(["eval", *map(str, words), "--log-samples"]) == 0
            (paths[name],) = (folder / "out" / name).rglob("results_*.json")
        evaluate_scripted(folder / "out" / "scripted")
        (paths["scripted"],) = (folder / "out" / "scripted").rglob("results_*.json")
    return paths


def evaluate_scripted(output: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    class Scripted(LM):
        def loglikelihood(self, requests):
            return [(-1.0 * len(request.args[1]), False) for request in requests]

        def generate_until(self, requests):
            return [" Die Antwort ist 2. The answer is 2." for _ in requests]

        loglikelihood_rolling = None

    tracker = EvaluationTracker(output_path=str(output))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(
        Scripted(), tasks=["dsv3_c3", "dsv3_mgsm"], task_manager=manager, evaluation_tracker=tracker
    )
    assert results is not None
    tracker.save_results_aggregated(results=results, samples=results.pop("samples"))


def test_made_up_results_have_the_form_of_real_ones(real):
    written, made = json.loads(real["scripted"].read_text()), result({"c3": 1.0, "mgsm": 1.0})
    for part, content in made.items():
        assert part in written
        if part != "config":
            for name, value in content.items():
                if name not in written[part]:
                    assert name in LEAVES["dsv3_mgsm"]  # whose data are not there
                elif part == "configs":
                    assert value.keys() <= written[part][name].keys()
                elif isinstance(value, dict):
                    assert {key for key in value if "," not in key} <= written[part][name].keys()
    ours = json.loads(real["ours"].read_text())
    assert made["config"].keys() <= ours["config"].keys()
    assert made["config"]["dsv3_model_info"].keys() <= ours["config"]["dsv3_model_info"].keys()


def test_scores_are_those_that_lm_eval_wrote(real, run):
    written = {name: json.loads(path.read_text()) for name, path in real.items()}
    for name in ("ours", "scripted"):
        score = column(real[name]).scores[ROWS["c3"]]
        theirs = written[name]["results"]["dsv3_c3"]
        assert score.value == 100 * theirs["acc_ppl,none"]
        assert score.stderr == pytest.approx(100 * theirs["acc_ppl_stderr,none"])
    mgsm = column(real["scripted"]).scores[ROWS["mgsm"]]
    assert mgsm.value == pytest.approx(40.0)  # 1 of 2 and 1 of 3
    assert mgsm.departures[0] == "partial: 2 of 11 tasks, without bn, es, fr, ja, ru, sw, te, th, zh"
    out = run(real["ours"], real["scripted"]).out
    assert "2 of 11 tasks" in section(out, "Notes")
    ours = lines_of(out, "Table 3")["# Total Params"]["ours"]
    total = written["ours"]["config"]["dsv3_model_info"]["num_parameters_total"]
    assert ours == f"{total / 1000:.1f}K"


def test_the_error_of_a_difference_is_of_pairs_where_samples_are_there(real, run, tmp_path):
    from lm_eval.api.metrics import mean_stderr

    row = next(row for row in reports.small_rows() if row.benchmark == "c3" and row.metric == "bpb")
    paths = [real["ours"], real["other seed"]]
    a, b = reports.result_columns([(None, path) for path in paths], [row])
    values = []
    for path in paths:
        (samples,) = path.parent.glob("samples_dsv3_c3_*.jsonl")
        values.append([json.loads(line)["bpb"] for line in samples.read_text(encoding="utf-8").splitlines()])
    gaps = [mine - other for mine, other in zip(*values, strict=True)]
    assert len(gaps) == 24
    found = reports.compare(row, a, b)
    assert found.paired
    assert found.gap == pytest.approx(statistics.fmean(gaps))
    assert found.stderr == pytest.approx(mean_stderr(gaps))

    # Without the samples of one of them, the two are independent.
    lonely = tmp_path / paths[0].name
    lonely.write_bytes(paths[0].read_bytes())
    (alone,) = reports.result_columns([(None, lonely)], [row])
    apart = reports.compare(row, alone, b)
    assert not apart.paired
    assert apart.stderr == pytest.approx(math.hypot(a.scores[row].stderr or 0, b.scores[row].stderr or 0))
    assert apart.stderr != pytest.approx(found.stderr)
    assert ResultFile(lonely).samples(row, a.scores[row]) is None

    # Samples of something else are no samples of the score.
    (samples,) = paths[0].parent.glob("samples_dsv3_c3_*.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines()
    beside = tmp_path / samples.name
    beside.write_text("\n".join(lines[:-1]), encoding="utf-8")
    assert ResultFile(lonely).samples(row, a.scores[row]) is None
    beside.write_text("\n".join(lines), encoding="utf-8")
    assert len(ResultFile(lonely).samples(row, a.scores[row]) or ()) == 24
    # Samples of other records are no pairs.
    beside.write_text("\n".join(lines).replace('"doc_hash": "', '"doc_hash": "0'), encoding="utf-8")
    (others,) = reports.result_columns([(None, lonely)], [row])
    assert len(others.source.samples(row, others.scores[row])) == 24
    assert not reports.compare(row, others, b).paired
    beside.write_text("nonsense", encoding="utf-8")
    done = run(lonely, paths[1])
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"dsv3: {beside}: no samples of lm-eval")


# Formats


def test_csv_has_every_number_unrounded(write, run):
    a = result({"mmlu": 87.123456, "pile_test": 0.54321})
    b = result({"mmlu": 50.0})
    text = run(f"a={write('a', a)}", f"b={write('b', b)}", "--format", "csv").out
    head, *lines = csv.reader(io.StringIO(text))
    assert len(set(head)) == len(head)
    assert {len(line) for line in lines} == {len(head)}
    rows = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    assert [rows["total"]["DeepSeek-V3 Base"], rows["total"]["a"]] == ["671B", "15.7B"]
    mmlu = rows["MMLU (EM)"]
    assert float(mmlu["a"]) == pytest.approx(87.123456)
    assert float(mmlu["a - b"]) == pytest.approx(37.123456)
    assert float(mmlu["a - b: stderr"]) == pytest.approx(math.sqrt(2))
    assert [mmlu["a - b: level"], mmlu["a - DeepSeek-V3 Base: level"]] == ["better", "same"]
    assert mmlu["DeepSeek-V2 Base - DeepSeek-V3 Base: level"] == "worse"
    assert rows["Pile-test (BPB)"]["b: note"] == "not run"
    assert rows["Pile-test (BPB)"]["unit"] == "bits per byte"
    assert rows["Pile-test (BPB)"]["a - DeepSeek-V3 Base: level"] == "better"
    assert rows["Pile-test (BPB)"]["a: stderr"] == ""


class Page(HTMLParser):
    """Text, sources and balance of tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.links, self.widths = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag == "tr":
            self.widths.append(0)
        if tag in ("td", "th"):
            self.widths[-1] += int(values.get("colspan", 1))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file_and_shows_names_as_they_are(write, run, tmp_path):
    pytest.importorskip("matplotlib")
    name = "<b>&|*mine*"
    path = write("a", changed(result({"mmlu": 60.0}), **{"n-shot__dsv3_mmlu": 4}))
    output = tmp_path / "table3.html"
    done = run(f"{name}={path}", "--output", output)
    assert (done.code, done.out, done.err) == (0, "", f"dsv3: wrote {output}\n")
    page = Page(output.read_text(encoding="utf-8"))
    assert page.open == []
    assert [link[:22] for link in page.links] == ["data:image/png;base64,"]
    assert f"Differences: {name}" not in page.text  # nothing to compare
    assert page.text.count(name) >= 3
    assert "60.0 ± 1.0" in page.text
    assert "4-shot, the table has 5-shot" in page.text
    assert page.widths[0] == 7
    assert set(page.widths[:40]) == {7}
    markdown = run(f"{name}={path}").out
    assert name in next(iter(tables(markdown).values()))[0]
    assert not list(tmp_path.glob(".*"))


def test_the_figure_shows_the_scores_and_two_errors(write, run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    words = [f"ours={write('a', result({'mmlu': 60.0, 'pile_test': 0.7}))}", "--columns", "deepseek-v3"]
    assert run(*words, "--figure", tmp_path / "deep" / "a.png").code == 0
    assert (tmp_path / "deep" / "a.png").read_bytes()[:4] == b"\x89PNG"
    percent, bits = figures[0].axes
    labels = [text.get_text() for text in percent.get_yticklabels()]
    assert labels == [row.label for row in ROWS.values() if not row.bits]
    theirs, ours = percent.containers
    assert theirs.lines[0].get_xdata().tolist() == [V3[name] for name in ROWS if name != "pile_test"]
    assert ours.lines[0].get_xdata().tolist() == [60.0]
    assert round(ours.lines[0].get_ydata()[0]) == labels.index("MMLU (EM)")
    (bar,) = ours.lines[2][0].get_segments()
    assert sorted(x for x, _ in bar) == pytest.approx([58.0, 62.0])
    assert [line.lines[0].get_xdata().tolist() for line in bits.containers] == [[0.548], [0.7]]


def test_the_figure_of_ablations_shows_differences(write, run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    a, b = write("a", result({"mmlu": 60.0})), write("b", result({"mmlu": 59.0}))
    words = [f"a={a}", f"b={b}", "--layout", "ablation"]
    run(*words, "--columns", "4-small", "--figure", tmp_path / "a.png")
    percent, bits = figures[0].axes
    theirs, ours = percent.containers
    assert theirs.lines[0].get_xdata().tolist()[:3] == pytest.approx([2.4, 3.3, 2.1])
    assert ours.lines[0].get_xdata().tolist() == pytest.approx([-1.0])
    (bar,) = ours.lines[2][0].get_segments()
    assert sorted(x for x, _ in bar) == pytest.approx([-1 - 2 * math.sqrt(2), -1 + 2 * math.sqrt(2)])
    assert [axes.patches[0].get_width() for axes in (percent, bits)] == pytest.approx([0.6, 0.006])

    # Nothing that can be compared, nothing to draw.
    other = write("c", result({"gsm8k": 50.0}))
    words = [a, other, "--layout", "ablation", "--columns", "none"]
    done = run(*words, "--figure", tmp_path / "b.png")
    assert (done.code, len(figures)) == (2, 1)
    assert done.err.startswith("dsv3: no figure: there is nothing to draw")
    assert run(*words, "--output", tmp_path / "c.html").code == 0
    assert "No figure: there is nothing to draw" in (tmp_path / "c.html").read_text(encoding="utf-8")


# Mistakes


BROKEN = {
    "no file": (None, "cannot be read (No such file or directory)"),
    "no JSON": ("{", "no result of lm-eval, as it is no JSON"),
    "a list": ([], "no result of lm-eval, as it holds no object"),
    "draws": ({"seeds": [0], "results": {}}, "no result of lm-eval, as it has no object 'group_subtasks'"),
    "a task": ({"results__dsv3_mmlu": 1}, "no result of lm-eval, as results.dsv3_mmlu is no object"),
    "counts": ({"n-samples__dsv3_mmlu": {}}, "no result of lm-eval, as n-samples.dsv3_mmlu.original is no number"),
    "no shots": ({"n-shot__dsv3_mmlu": None}, "has a score of dsv3_mmlu and no n-shot.dsv3_mmlu"),
    "no version": ({"versions__dsv3_mmlu": None}, "has a score of dsv3_mmlu and no versions.dsv3_mmlu"),
    "no config": ({"configs__dsv3_mmlu": None}, "has a score of dsv3_mmlu and no configs.dsv3_mmlu"),
    "no settings": ({"config": None}, "no result of lm-eval, as it has no object 'config'"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_result_is_one_error(content, message, write, run, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        is_change = isinstance(content, dict) and "seeds" not in content
        write("a", changed(result({"mmlu": 60.0}), **content) if is_change else content)
    done = run(path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"dsv3: {path}: {message}")
    assert done.err.count("\n") == 1


def test_a_command_that_cannot_work_is_one_error(write, run, tmp_path):
    path = write("a", result({"mmlu": 60.0}))
    for words, message in (
        ([tmp_path], f"{tmp_path}: is a folder"),
        ([path, "--layout", "ablation"], "--layout ablation: takes results by pairs, A and B; 1 cannot be paired"),
        ([path, "--columns", "gpt"], "--columns gpt: no published column"),
        ([path, path, "--layout", "ablation", "--columns", "deepseek-v3"], "--columns deepseek-v3: no published"),
        ([path, "--figure", "a.pdf"], "--figure a.pdf: the figure is a PNG"),
        ([path, "--output", tmp_path / "no" / "a.md"], f"--output {tmp_path / 'no' / 'a.md'}: cannot be written"),
        ([f"a={path}", f"a={path}"], f"a={path}: there is a column of this name already"),
        ([f"DeepSeek-V3 Base={path}"], f"DeepSeek-V3 Base={path}: there is a column of this name already"),
        ([f"={path}"], f"={path}: must be FILE.json or NAME=FILE.json"),
    ):
        done = run(*words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"dsv3: {message}")
        assert done.err.count("\n") == 1


def test_columns_are_named_by_the_ends_of_their_paths(write):
    names = ["runs/a/checkpoints/last.ckpt", "runs/b/checkpoints/last.ckpt", "x/tiny", "y/tiny", "org/one", "org/one"]
    files = []
    for index, name in enumerate(names):
        data = changed(result({"mmlu": 1.0}), config__dsv3_model_info__name=name)
        files.append((None, write(str(index), data)))
    read = reports.result_columns(files, list(ROWS.values()))
    assert [one.name for one in read] == ["a/last.ckpt", "b/last.ckpt", "x/tiny", "y/tiny", "org/one #5", "org/one #6"]
