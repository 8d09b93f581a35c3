"""The README and the pages of docs/ keep their word: their Python runs, their commands exist, links lead somewhere.

A comment right above a block says what the page itself should not show:

    <!-- test: before                   code to run before a Python block, for example to define the
    ...                                 reader's own model, or to make the run tiny
    -->

Each Python block runs in a process of its own, in an empty folder. A shell command is not run but checked: a
target of `make` must exist, `lightning run model` must parse with its configuration, a script must be there.
A command of no known kind fails, so nothing passes unread.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

from lightning_dsv3.cli import dsv3
from lightning_dsv3.cli.launch_options import parse_launch_options
from lightning_dsv3.config import load_run_config

README = ROOT / "README.md"
# The blocks of docs/balance.md need a model around them: tests/test_balance_loops.py runs them.
PAGES = [README, ROOT / "docs" / "inference.md", ROOT / "docs" / "evaluation.md", ROOT / "docs" / "kernels.md"]
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<mark>.*?)-->[ \t]*\n\s*)?"
    r"^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ \t]*$",
    re.M | re.S,
)
SHELLS = {"bash", "sh", "shell", "console"}
# Shown as text: output, trees and settings. A block of any other language must be given a check here.
SHOWN = {"", "text", "yaml", "toml", "json", "diff"}
# Programs of the reader's own machine, which this project cannot promise anything about.
FOREIGN = {"cd", "git", "pip", "uv", "apt-get", "sudo", "source", "export", "ls", "cat", "tensorboard"}


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    before: str = ""
    page: str = "README.md"

    def __str__(self) -> str:
        return f"{self.page}-{self.language or 'plain'}-line{self.line}"


def read_blocks(text: str, page: str = "README.md") -> list[Block]:
    blocks = []
    for match in BLOCK.finditer(text):
        mark = (match["mark"] or "").strip()
        before = re.fullmatch(r"before\n(.*)", mark, re.S)
        if mark and not before:
            raise ValueError(f"{page}: unknown mark <!-- test: {mark} -->")
        line = text.count("\n", 0, match.start("fence")) + 1
        language = match["language"].strip()
        blocks.append(Block(line, language, match["code"], before[1] if before else "", page))
    return blocks


def shell_commands(code: str) -> list[list[str]]:
    """Split a shell block into commands as words, without prompts, comments and environment settings."""
    lines = code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]  # the others are output
    commands = []
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|", ";"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
                words.pop(0)
            if words:
                commands.append(words)
            words = []
    return commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))


def check_command(words: list[str]) -> None:
    program = Path(words[0]).name
    if program in ("python", "python3"):
        words = words[1:]
        if words[:2] == ["-m", "lightning_dsv3"]:
            program, words = "lightning", ["lightning", *words[2:]]
        elif words[:1] == ["-m"]:
            program = {"pip": "pip", "venv": "pip", "pytest": "pytest"}.get(words[1], words[1])
        else:
            assert (ROOT / words[0]).is_file(), f"there is no script {words[0]}"
            return
    if program == "lightning":
        check_lightning(words[1:])
    elif program == "dsv3":
        assert words[1] in dsv3.COMMANDS, f"there is no command dsv3 {words[1]}"
        load_run_config([word for word in words[2:] if "=" in word])
    elif program == "lm_eval":
        check_lm_eval(words[1:])
    elif program == "torchrun":
        module = words.index("-m") + 1
        assert words[module] == "lm_eval", f"no check knows what torchrun starts: {words[module]}"
        check_lm_eval(words[module + 1 :])
    elif program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= make_targets(), f"the Makefile has no {targets}"
    elif program not in FOREIGN | {"pytest"}:
        raise AssertionError(f"a command that no check knows: {' '.join(words)}")


def check_lm_eval(words: list[str]) -> None:
    options = dict(pairwise(words))
    known = {
        name
        for path in (ROOT / "src" / "lightning_dsv3" / "evaluation" / "tasks").rglob("*.yaml")
        for name in re.findall(r"^(?:task|group): *(\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    if "--model" in options:
        assert options["--model"] == "dsv3"
        assert set(options["--tasks"].split(",")) <= known, f"not all of {options['--tasks']} are tasks"


def check_lightning(words: list[str]) -> None:
    if words[:2] != ["run", "model"] or "--help" in words:
        return
    # Files of the reader's own: a run that was made before, a configuration written by hand.
    options = parse_launch_options([word for word in words[2:] if not word.startswith(("resume=", "config="))])
    if options.script == Path("examples/train.py"):
        load_run_config(options.script_arguments)


BLOCKS = [block for page in PAGES for block in read_blocks(page.read_text(encoding="utf-8"), page.name)]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_block_runs(block, tmp_path):
    (tmp_path / "block.py").write_text(block.before + "\n" + block.code)
    environ = os.environ | {"LIGHTNING_DSV3_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "block.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, f"{block.page} line {block.line}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in SHELLS], ids=str)
def test_shell_block_names_what_exists(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in shell_commands(block.code):
        check_command(words)


def test_every_block_is_of_a_known_kind():
    languages = {block.language for block in BLOCKS}
    assert languages <= SHELLS | SHOWN | {"python"}


def test_the_page_shows_python_and_both_commands():
    commands = [words for block in BLOCKS if block.language in SHELLS for words in shell_commands(block.code)]
    assert ["make", "train"] in commands
    assert ["make", "test"] in commands
    assert any(block.language == "python" for block in BLOCKS)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "balance.md"], ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files_of_the_project(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    assert [target for target in local if not (page.parent / target).exists()] == []


class TestThisTest:
    """The reader of the page is itself checked."""

    PAGE = (
        "a line\n```bash\nlightning run model\n```\n"
        "<!-- test: before\nx = 1\n-->\n```python\nprint(x)\n```\n"
        "```console\n$ make test && A=1 make train ARGS='a=1'  # all\nan output line\n```\n"
    )

    def test_blocks_and_marks_are_read(self):
        first, second, third = read_blocks(self.PAGE)
        assert (first.before, first.line) == ("", 2)
        assert (second.before.strip(), second.code) == ("x = 1", "print(x)\n")
        assert shell_commands(third.code) == [["make", "test"], ["make", "train", "ARGS=a=1"]]

    def test_an_unknown_mark_is_an_error(self):
        with pytest.raises(ValueError, match="unknown mark"):
            read_blocks("<!-- test: ignore -->\n```python\n```\n")

    @pytest.mark.parametrize(
        "command",
        [
            "make fly",
            "dsv3 fly",
            "dsv3 config model.fly=1",
            "lightning run model nothing.py",
            "python nothing.py",
            "dvs3 presets",
        ],
    )
    def test_a_wrong_command_is_found(self, command, monkeypatch):
        monkeypatch.chdir(ROOT)
        with pytest.raises((AssertionError, ValueError)):
            check_command(command.split())
