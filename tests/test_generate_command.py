"""``dsv3 generate``: what is printed is what the model says, as it says it; every mistake is one line."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saved_models import plain_greedy, save_hf, trained_run

from lightning_dsv3.checkpoint import load_for_inference
from lightning_dsv3.cli import dsv3
from lightning_dsv3.cli import generate as command
from lightning_dsv3.inference import Decoder, Sampling, generate
from lightning_dsv3.metrics import MTPAcceptance

PROMPTS = ["The 5th of", "x7 = 4", "", "\u00e9t\u00e9 \U0001f600", "print(x1"]
COUNT = 24

Generate = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("saved")
    run, model = trained_run(folder / "runs")
    loaded = load_for_inference(run)
    ids = {prompt: plain_greedy(model, loaded.encode(prompt), COUNT) for prompt in PROMPTS}
    return SimpleNamespace(run=run, model=model, loaded=loaded, ids=ids, hf=save_hf(run, model, folder / "hf"))


@pytest.fixture
def run(saved: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Run the command on the saved run, 24 new tokens unless told otherwise."""

    def call(*words: Any) -> SimpleNamespace:
        defaults = ["--checkpoint", saved.run, "--max-new-tokens", COUNT]
        code = dsv3.main(["generate", *map(str, [*defaults, *words])])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def text_of(saved: SimpleNamespace, prompt: str) -> str:
    return saved.loaded.tokenizer.decode(saved.ids[prompt])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# One text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_likeliest_text_is_printed_behind_its_prompt(prompt: str, saved: SimpleNamespace, run: Generate) -> None:
    result = run(prompt)
    assert (result.code, result.out) == (0, f"{prompt}{text_of(saved, prompt)}\n")
    first, last = result.err.splitlines()
    assert first == (
        f"dsv3: {saved.run / 'checkpoints' / 'last.ckpt'} (float32, cpu); tokenizer: {saved.run / 'tokenizer.json'}"
    )
    assert re.fullmatch(rf"dsv3: {COUNT} tokens in [\d.]+ s, [\d.]+ tokens/s", last)


class Recorder(io.StringIO):
    """Keeps what was written apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces += [text] if text else []
        return super().write(text)


def test_text_is_printed_as_it_grows(saved: SimpleNamespace, run: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    rounds, seen = Decoder.__iter__, []

    def watched(decoder: Decoder) -> Iterator[list[Any]]:
        for made in rounds(decoder):
            seen.append(recorder.getvalue())
            yield made

    monkeypatch.setattr(Decoder, "__iter__", watched)
    monkeypatch.setattr(sys, "stdout", recorder)
    run(PROMPTS[0])
    decode = saved.loaded.tokenizer.decode
    shown = [PROMPTS[0] + decode(saved.ids[PROMPTS[0]][:count]) for count in range(COUNT)]
    # A character that lacks its end is not shown, and neither is what cannot be told from one.
    assert [text.rstrip("\ufffd") for text in seen] == [text.rstrip("\ufffd") for text in shown]
    assert seen[-1] != seen[COUNT // 2] != seen[0] == PROMPTS[0]


def test_no_character_is_broken(saved: SimpleNamespace, run: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    # A row of single bytes, most of which are parts of characters.
    text = "na\u00efve \u4f60\u597d \U0001f600\U0001f680 \u00e9t\u00e9"
    ids = saved.loaded.tokenizer.encode(text).ids
    assert any(saved.loaded.tokenizer.decode([token]) == "\ufffd" for token in ids)

    def says(decoder: Decoder) -> Iterator[list[Any]]:
        for number, token in enumerate(ids, start=1):
            yield [(0, [token], "length" if number == len(ids) else "")]

    monkeypatch.setattr(Decoder, "__iter__", says)
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    run("", "--quiet")
    assert "".join(recorder.pieces) == f"{text}\n"
    assert len(recorder.pieces) > len(text) // 2
    assert not any("\ufffd" in piece for piece in recorder.pieces)


@pytest.mark.parametrize("seed", [0, 1])
def test_even_bytes_that_are_no_text_are_printed_as_they_decode(
    seed: int, saved: SimpleNamespace, run: Generate
) -> None:
    result = run(PROMPTS[0], "--quiet", "--temperature", 5, "--seed", seed, "--max-new-tokens", 60)
    prompt = saved.loaded.encode(PROMPTS[0])
    ids = generate(
        saved.model, torch.tensor([prompt]), max_new_tokens=60, do_sample=True, temperature=5.0, seeds=seed,
        eos_token_id=saved.loaded.eos_token_ids,
    )  # fmt: skip
    text = saved.loaded.tokenizer.decode(ids[0, len(prompt) :].tolist())
    assert "\ufffd" in text
    assert result.out == f"{text}\n"


def test_quiet_leaves_what_is_generated(saved: SimpleNamespace, run: Generate) -> None:
    result = run(PROMPTS[0], "--quiet")
    assert (result.out, result.err) == (f"{text_of(saved, PROMPTS[0])}\n", "")


def test_drafts_leave_the_likeliest_text_as_it_is(saved: SimpleNamespace, run: Generate) -> None:
    result = run(*PROMPTS, "--speculative", "--num-drafts", 2)
    assert result.out == "\n".join(f"{prompt}{text_of(saved, prompt)}\n" for prompt in PROMPTS)
    assert "drafts accepted by position: " in result.err
    assert "drafts" not in run(PROMPTS[0]).err


def test_what_became_of_drafts_is_summed_up(saved: SimpleNamespace, run: Generate) -> None:
    words = ["--speculative", "--num-drafts", 2, "--temperature", 3, "--seed", 0, "--max-new-tokens", 60]
    result = run(*PROMPTS[:2], *words, "--batch-size", 1)
    acceptance, tokens, passes = MTPAcceptance(2), 0, 0
    for seed, prompt in enumerate(PROMPTS[:2]):
        ids = [saved.loaded.encode(prompt)]
        rounds = list(
            Decoder(
                saved.model, ids, max_new_tokens=60, sampling=Sampling(3.0), seeds=seed, num_drafts=2,
                eos_token_ids=saved.loaded.eos_token_ids, acceptance=acceptance,
            )
        )  # fmt: skip
        # The prompt's pass is none of those that drafts can make fewer.
        passes += len(rounds) - 1
        tokens += sum(len(new.tokens) for (new,) in rounds[1:])
    first, second = acceptance.compute().tolist()
    assert 0 < second != first < 1
    expected = f"seed 0; drafts accepted by position: {first:.0%} {second:.0%}; {tokens / passes:.2f} tokens per pass"
    assert tokens > passes
    assert result.err.endswith(f", {expected}\n")


def test_a_stop_text_ends_it_escapes_included(saved: SimpleNamespace, run: Generate, tmp_path: Path) -> None:
    text = text_of(saved, PROMPTS[1])
    word = text[5:8]
    escaped = "".join(f"\\u{ord(character):04x}" for character in word)
    assert run(PROMPTS[1], "--quiet", "--stop", "zzz", "--stop", escaped).out == f"{text[: text.index(word)]}\n"
    run(PROMPTS[1], "--stop", escaped, "--output", tmp_path / "x.jsonl")
    (record,) = records(tmp_path / "x.jsonl")
    assert record["finish_reason"] == "stop"
    ids = saved.ids[PROMPTS[1]]
    assert word in saved.loaded.decode(ids[: record["num_tokens"]])
    assert word not in saved.loaded.decode(ids[: record["num_tokens"] - 1])


@pytest.mark.parametrize(
    ("written", "meant"), [(r"\n\t\r", "\n\t\r"), (r"\\n", r"\n"), (r"\x41\u00e9", "A\u00e9"), (r"\d\ ü", r"\d\ ü")]
)
def test_escapes(written: str, meant: str) -> None:
    assert command._unescaped(written) == meant


def test_a_prompt_comes_from_stdin(saved: SimpleNamespace, run: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPTS[3]}\n".encode())))
    assert run("-").out == f"{PROMPTS[3]}{text_of(saved, PROMPTS[3])}\n"


# Drawn text


def test_a_seed_makes_draws_repeatable(run: Generate, tmp_path: Path) -> None:
    def drawn(*words: Any) -> list[str]:
        assert run(*PROMPTS, "--temperature", 1.2, "--output", tmp_path / "x.jsonl", *words).code == 0
        return [record["text"] for record in records(tmp_path / "x.jsonl")]

    texts = drawn("--seed", 5)
    assert drawn("--seed", 5, "--batch-size", 1) == texts
    assert drawn("--seed", 5, "--batch-size", 3) == texts
    assert drawn("--seed", 50) != texts
    assert len(set(drawn("--seed", 5, "--prompts", prompts_file(tmp_path, ["same"] * 4))[-4:])) == 4


def test_a_seed_that_was_not_given_is_told(run: Generate) -> None:
    first = run(PROMPTS[0], "--temperature", 1.2)
    seed = re.search(r", seed (\d+)$", first.err.strip())
    assert seed
    assert run(PROMPTS[0], "--temperature", 1.2, "--seed", seed[1]).out == first.out
    assert run(PROMPTS[0], "--temperature", 1.2).out != first.out
    assert "seed" not in run(PROMPTS[0]).err


def test_what_is_drawn_from_can_be_narrowed_to_the_likeliest(saved: SimpleNamespace, run: Generate) -> None:
    greedy = f"{PROMPTS[0]}{text_of(saved, PROMPTS[0])}\n"
    assert run(PROMPTS[0], "--temperature", 2, "--top-k", 1).out == greedy
    assert run(PROMPTS[0], "--temperature", 2, "--top-p", 1e-6).out == greedy
    assert run(PROMPTS[0], "--temperature", 1e-4).out == greedy
    assert run(PROMPTS[0], "--temperature", 2, "--seed", 1).out != greedy


# Many texts


def prompts_file(folder: Path, prompts: list[str], name: str = "prompts.txt") -> Path:
    lines = prompts if name.endswith("txt") else [json.dumps({"id": 1, "prompt": prompt}) for prompt in prompts]
    path = folder / name
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_texts_come_in_the_order_of_their_prompts(batch_size: int, saved: SimpleNamespace, run: Generate) -> None:
    result = run(*PROMPTS, "--batch-size", batch_size)
    assert result.out == "\n".join(f"{prompt}{text_of(saved, prompt)}\n" for prompt in PROMPTS)
    assert result.err.splitlines()[-1].startswith(f"dsv3: {COUNT * len(PROMPTS)} tokens ")


def test_a_text_that_is_ready_waits_for_those_before_it() -> None:
    file = io.StringIO()
    texts = [command._Text(prompt, command.TextStream(lambda ids: "abc"[ids[0]] * len(ids))) for prompt in "123"]
    show = command._Printer(file, with_prompts=True)
    show(texts)
    assert file.getvalue() == ""
    texts[0].begun = texts[1].begun = True
    texts[1].add([1], "eos")
    show(texts)
    assert file.getvalue() == "1"
    texts[0].add([0], "")
    show(texts)
    assert file.getvalue() == "1a"
    texts[0].add([0], "length")
    show(texts)
    assert file.getvalue() == "1aa\n\n2b\n"
    texts[2].begun = True
    show(texts)
    assert file.getvalue() == "1aa\n\n2b\n\n3"


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_come_from_a_file(name: str, saved: SimpleNamespace, run: Generate, tmp_path: Path) -> None:
    result = run(PROMPTS[4], "--prompts", prompts_file(tmp_path, [PROMPTS[3], PROMPTS[0]], name), "--quiet")
    assert result.out == "\n".join(f"{text_of(saved, PROMPTS[index])}\n" for index in (4, 3, 0))


def test_each_text_is_a_line_of_json(saved: SimpleNamespace, run: Generate, tmp_path: Path) -> None:
    # The fifth token of one text is made an end of sentence, so that not all are equally long.
    end = saved.ids[PROMPTS[0]][4]
    (saved.hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    words = ["--checkpoint", saved.hf, "--output", tmp_path / "x.jsonl", "--batch-size", 2]
    result = run(*PROMPTS[:2], PROMPTS[3], *words)
    assert (result.code, result.out) == (0, "")
    for record, prompt in zip(records(tmp_path / "x.jsonl"), [*PROMPTS[:2], PROMPTS[3]], strict=True):
        ids = plain_greedy(saved.model, saved.loaded.tokenizer.encode(prompt).ids, COUNT)
        kept = ids[: ids.index(end) + 1] if end in ids else ids
        reason = "eos" if end in ids else "length"
        assert record == {
            "prompt": prompt,
            "text": saved.loaded.tokenizer.decode(kept),
            "finish_reason": reason,
            "num_tokens": len(kept),
        }


# Ctrl-C


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Press it in the third round of every batch."""
    rounds = Decoder.__iter__

    def interrupted(decoder: Decoder) -> Iterator[list[Any]]:
        for number, made in enumerate(rounds(decoder)):
            for _ in range(times if number == 2 else 0):
                signal.raise_signal(signal.SIGINT)
            yield made

    monkeypatch.setattr(Decoder, "__iter__", interrupted)


def test_ctrl_c_leaves_what_there_is(
    saved: SimpleNamespace, run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_ctrl_c(monkeypatch)
    decode = saved.loaded.tokenizer.decode
    beginnings = [decode(saved.ids[prompt][:3]) for prompt in PROMPTS]
    result = run(*PROMPTS[:4], "--batch-size", 2)
    printed = [f"{prompt}{text}\n" for prompt, text in zip(PROMPTS[:2], beginnings[:2], strict=True)]
    assert (result.code, result.out) == (130, "\n".join(printed))
    assert result.err.splitlines()[-1].startswith("dsv3: 6 tokens in ")
    assert run(*PROMPTS[:4], "--batch-size", 2, "--output", tmp_path / "x.jsonl").code == 130
    assert records(tmp_path / "x.jsonl") == [
        {"prompt": prompt, "text": text, "finish_reason": "interrupted", "num_tokens": 3}
        for prompt, text in zip(PROMPTS[:2], beginnings[:2], strict=True)
    ]


def test_a_second_ctrl_c_stops_at_once(run: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, times=2)
    result = run(PROMPTS[0])
    assert result.code == 130
    assert len(result.err.splitlines()) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored(
    saved: SimpleNamespace, run: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_ctrl_c(monkeypatch)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run(PROMPTS[0])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.code, result.out) == (0, f"{PROMPTS[0]}{text_of(saved, PROMPTS[0])}\n")


def test_a_process_streams_and_stops_at_ctrl_c(saved: SimpleNamespace) -> None:
    words = ["generate", "--checkpoint", saved.run, PROMPTS[0], "--max-new-tokens", "1000", "--speculative"]
    # An output that has no such characters shows others in their place.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environ["PYTHONIOENCODING"] = "ascii"
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_dsv3", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
        bufsize=0,
    )  # fmt: skip
    assert process.stdout is not None
    begin = b""
    while len(begin) <= len(PROMPTS[0]) and (piece := process.stdout.read(1)):
        begin += piece
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    whole = (begin + out).decode("ascii")
    expected = (PROMPTS[0] + text_of(saved, PROMPTS[0])).encode("ascii", errors="replace").decode()
    assert whole.endswith("\n")
    assert expected.startswith(whole[:-1]) or whole.startswith(expected)
    loaded, figures = err.decode().splitlines()
    assert "last.ckpt (float32, cpu)" in loaded
    assert int(re.search(r"dsv3: (\d+) tokens in .* drafts accepted", figures)[1]) < 1000  # type: ignore[index]


# Mistakes


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "no prompt": ([], "no prompt; give one"),
    "no checkpoint": (["--checkpoint", "nowhere.ckpt", "a"], "nowhere.ckpt: there is no such file or folder"),
    "too long": (["a", "b", "--max-new-tokens", 2000, "--batch-size", 1], "prompt 0 has .* max_position_embeddings"),
    "second too long": (["a", "b" * 1200, "--batch-size", 1], "prompt 1 has 1201 tokens .* max_position_embeddings"),
    "tokens": (["a", "--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
    "batch": (["a", "--batch-size", 0], "--batch-size 0: must be at least 1"),
    "temperature": (["a", "--temperature", "-1"], "--temperature -1.0: must be 0"),
    "not a temperature": (["a", "--temperature", "nan"], "--temperature nan: must be 0"),
    "top-k": (["a", "--top-k", 5], "--top-k: .* give --temperature T"),
    "top-k 0": (["a", "--top-k", 0, "--temperature", 1], "--top-k 0: must be at least 1"),
    "top-p": (["a", "--top-p", 1.5, "--temperature", 1], "--top-p 1.5: must be above 0"),
    "seed": (["a", "--seed", -1], "--seed -1: must be from 0"),
    "stop": (["a", "--stop", ""], "--stop: an empty text"),
    "drafts": (["a", "--num-drafts", 2], "--num-drafts 2: .* give --speculative"),
    "output": (["a", "--output", "x.txt"], "--output x.txt: .* name in .jsonl"),
    "output folder": (["a", "--output", "no/x.jsonl"], "--output no/x.jsonl: there is no folder no"),
    "output is a folder": (["a", "--output", "folder.jsonl"], "--output folder.jsonl: cannot be written"),
    "prompts": (["--prompts", "no.txt"], "--prompts no.txt: cannot be read"),
    "empty prompts": (["--prompts", "empty.txt"], "--prompts empty.txt: holds no prompt"),
    "bytes": (["--prompts", "bytes.txt"], "--prompts bytes.txt: is not UTF-8 .* at byte 1"),
    "json": (["--prompts", "bad.jsonl"], "--prompts bad.jsonl, line 2: must be an object like"),
    "other json": (["--prompts", "other.jsonl"], "--prompts other.jsonl, line 1: must be an object like"),
    "argument bytes": (["a\udc80"], "is not UTF-8"),
    "stdin twice": (["-", "-"], "stdin can be read once"),
    "device": (["a", "--device", "abacus"], "device='abacus': cannot be used here"),
    "tokenizer": (["a", "--tokenizer", "empty.txt"], "empty.txt: cannot be read as a tokenizer"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    kind: str, run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"a\xff")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    Path("other.jsonl").write_text('{"prompt": 1}\n')
    words, message = MISTAKES[kind]
    before = set(tmp_path.iterdir())
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    lines = [line for line in result.err.splitlines() if "; tokenizer: " not in line]
    assert len(lines) == 1
    assert re.match(f"dsv3: .*{message}", lines[0])
    assert set(tmp_path.iterdir()) == before


def test_drafts_need_modules_that_draft(tmp_path: Path, run: Generate) -> None:
    folder, _ = trained_run(tmp_path, num_nextn_predict_layers=0)
    result = run("a", "--checkpoint", folder, "--speculative")
    assert result.code == 2
    assert "no MTP module to draft with" in result.err


def test_help_teaches_with_examples_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        dsv3.main(["generate", "--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    examples = [line for line in text.splitlines() if line.strip().startswith(("dsv3 generate", "echo"))]
    assert len(examples) == 5
    for line in examples:
        words = shlex.split(line.rpartition("dsv3 generate")[2])
        command._check(command._parser().parse_intermixed_args(words))
