"""On every record at hand: the gold answer scores 1 and a clearly different one scores 0.

The data sets may not be copied, so these tests need the folder that LIGHTNING_DSV3_DATA names and skip without it.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest

from lightning_dsv3.evaluation.scoring import (
    extract_call,
    score_agieval_choice,
    score_agieval_cloze,
    score_answer,
    score_bbh,
    score_cluewsc,
    score_cmath,
    score_cmrc,
    score_cruxeval_output,
    score_gsm8k,
    score_math,
)
from lightning_dsv3.evaluation.scoring.mathematics import last_boxed

FOLDER = Path(os.environ.get("LIGHTNING_DSV3_DATA", ""))
pytestmark = pytest.mark.skipif(
    "LIGHTNING_DSV3_DATA" not in os.environ, reason="LIGHTNING_DSV3_DATA does not name a folder of benchmark data"
)
WRONG_TEXT = "qwx zvk"


def lines(pattern):
    paths = sorted(FOLDER.glob(pattern))
    assert paths, f"no file {pattern} in LIGHTNING_DSV3_DATA={FOLDER}"
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def check(cases, at_least):
    """Each case is (scores of the gold answer, scores of a wrong one, the record's name)."""
    count = 0
    for right, wrong, name in cases:
        assert set(right.values()) == {1.0}, (name, right)
        assert set(wrong.values()) == {0.0}, (name, wrong)
        count += 1
    assert count >= at_least


def test_math():
    def cases():
        for record in lines("math/*.jsonl"):
            gold = last_boxed(record["solution"])
            stated = f"Work.\nFinal Answer: The final answer is ${gold}$. I hope it is correct."
            wrong = score_math(f"The final answer is ${WRONG_TEXT}$. I hope it is correct.", record["solution"])
            yield score_math(stated, record["solution"]), wrong, gold
            boxed = score_math(record["solution"], gold)
            # one more than the gold answer, where it has a value
            moved = score_math(f"The final answer is $1+{gold.lstrip('$')}$.", gold) if gold.isdigit() else wrong
            yield boxed, moved, gold

    check(cases(), 2000)


def test_gsm8k():
    def cases():
        for record in lines("gsm8k/*.jsonl"):
            gold = record["answer"].rpartition("####")[2].strip()
            for form in (gold, gold + ".0", f"${gold}", f"{gold}%"):
                yield (
                    score_gsm8k(f"First 3 + 4 = 7. The answer is {form}.", record["answer"]),
                    score_gsm8k(f"First {gold}. The answer is {int(gold.replace(',', '')) + 1}.", record["answer"]),
                    gold,
                )

    check(cases(), 4 * 660)


def test_mgsm():
    markers = {"de": "Die Antwort ist", "en": "The answer is", "es": "La respuesta es", "fr": "La réponse est"}
    markers |= {"ja": "答えは", "ru": "Ответ —", "zh": "答案是"}
    grouping = {"de": ".", "es": " ", "fr": "\u202f", "ru": " ", "en": ",", "ja": ",", "zh": ","}

    def cases():
        for path in sorted(FOLDER.glob("mgsm/mgsm_*.tsv")):
            language = path.stem.partition("_")[2]
            for line in path.read_text(encoding="utf-8").splitlines():
                gold = line.rpartition("\t")[2]
                number = int(gold.replace(",", ""))
                for form in (gold, str(number), f"{number:,}".replace(",", grouping[language])):
                    right = score_gsm8k(f"3 + 4 = 7. {markers[language]} {form}.", gold, language)
                    wrong = score_gsm8k(f"{gold}. {markers[language]} {number + 1}.", gold, language)
                    yield right, wrong, (language, form)

    check(cases(), 3 * 7 * 250)


def test_the_worked_exemplars_of_all_eleven_languages_are_read():
    data = json.loads((FOLDER / "mgsm" / "exemplars.json").read_text(encoding="utf-8"))
    answers = data["EXEMPLAR_NUMBER_ANSWERS"]
    assert len(data["MGSM_EXEMPLARS"]) == 11
    for language, exemplars in data["MGSM_EXEMPLARS"].items():
        for number, exemplar in exemplars.items():
            gold = answers[number] if isinstance(answers, dict) else answers[int(number) - 1]
            assert set(score_gsm8k(exemplar["a"], str(gold), language).values()) == {1.0}, (language, number)
            assert set(score_gsm8k(exemplar["a"], str(int(gold) + 1), language).values()) == {0.0}, (language, number)


def test_cmath():
    def cases():
        for record in lines("cmath/*.jsonl"):
            gold = record["golden"]
            wrong = score_cmath(f"{gold} 不对。先算 71 乘 83。一共 987 个。所以答案是：987654321。", gold)
            yield score_cmath(f"先算 3 乘 4。所以答案是：{gold}。", gold), wrong, gold
            yield score_cmath(f"所以答案是{gold}", gold), wrong, gold

    check(cases(), 2 * 298)


def test_cmrc():
    def cases():
        for path in sorted(FOLDER.glob("cmrc2018/*.json")):
            for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
                for question in (q for paragraph in article["paragraphs"] for q in paragraph["qas"]):
                    golds = [answer["text"] for answer in question["answers"]]
                    for gold in golds:
                        yield score_cmrc(gold, golds), score_cmrc("〇☃〇", golds), (question["id"], gold)
                    empty = score_cmrc("", golds)
                    assert set(empty.values()) == {0.0}, question["id"]

    check(cases(), 1002 + 3 * 1493)


def test_cluewsc():
    golds = defaultdict(list)
    for record in lines("cluewsc/*.json"):
        if record["label"] == "true":
            golds[record["text"], record["target"]["span2_index"]].append(record["target"]["span1_text"])

    def cases():
        for accepted in golds.values():
            for gold in accepted:
                yield score_cluewsc(f" {gold}。\n别的", accepted), score_cluewsc(gold + "们吗", accepted), gold

    check(cases(), 100)


def test_nq_open():
    def cases():
        for record in lines("nq_open/*.jsonl"):
            for gold in record["answer"]:
                right = score_answer(f" {gold}\nQ: next", record["answer"])
                yield right, score_answer(WRONG_TEXT, record["answer"]), (record["question"], gold)

    check(cases(), 1905)


def test_bbh():
    def cases():
        for path in sorted(FOLDER.glob("bbh/bbh/*.json")):
            for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
                gold = example["target"]
                right = score_bbh(f"Step by step.\nSo the answer is {gold}.", gold)
                yield right, score_bbh(f"So the answer is {gold[:-1]}.", gold), (path.stem, gold)
                yield score_bbh(f"the answer is {gold}", gold), score_bbh(gold, gold), (path.stem, gold)

    check(cases(), 2 * 3500)


def test_agieval():
    def cases():
        for record in lines("agieval/*.jsonl"):
            label, answer = record["label"], record.get("answer")
            if label is None:
                right = score_agieval_cloze(f" {answer}。", answer)
                yield right, score_agieval_cloze(f" {WRONG_TEXT}", answer), answer
                bare = re.sub(r"(?<!\\)\$", "", answer)
                yield score_agieval_cloze(rf"so $\boxed{{{bare}}}$", answer), score_agieval_cloze("", answer), answer
                continue
            letters = sorted(label)
            others = sorted(set("ABCDE") - set(letters))
            right = score_agieval_choice(f" {''.join(letters)}。解析：A、B、C、D", label)
            yield right, score_agieval_choice(f"({others[0]})", label), label
            if len(letters) > 1:
                spread = score_agieval_choice("、".join(f"({letter})" for letter in letters), label)
                yield spread, score_agieval_choice(letters[0], label), label
                yield spread, score_agieval_choice("".join(letters) + others[0], label), label

    check(cases(), 3900)


def test_cruxeval():
    def cases():
        for record in lines("cruxeval/*.jsonl"):
            gold, call = record["output"], f"f({record['input']})"
            right = score_cruxeval_output(f"assert {call} == {gold}\n[/ANSWER]\nassert 1 == 2", gold)
            yield right, score_cruxeval_output(f"assert {call} == [{gold}]", gold), record["id"]
            yield score_cruxeval_output(gold, gold), score_cruxeval_output(f"{call} = {gold}", gold), record["id"]
            found = extract_call(f"assert {call} == {gold}\n[/ANSWER]")
            assert re.sub(r"\s", "", found) == re.sub(r"\s", "", call), record["id"]

    check(cases(), 2 * 400)
