"""How fast is evaluation beside lm-eval's ``hf`` model, on equal weights, tokenizer and requests?

    LIGHTNING_DSV3_DATA=FOLDER python benchmarks/evaluation.py           a random model of the tiny preset's shape
    ... python benchmarks/evaluation.py --checkpoint runs/RUN           one that has been trained
    ... python benchmarks/evaluation.py --dtype bfloat16                how many choices flip with the batch size
    ... python benchmarks/evaluation.py --output benchmarks/results/evaluation.json

Only the request phase is timed: what lm-eval asks of a model, from text to log-likelihoods or text. Requests are made
once and given to both models in turn. ``hf`` is at its best here: attention ``sdpa``, of its expert implementations and
of several batch sizes the quickest, found for each benchmark on part of its requests; ``logits_cache`` is on, so that
letters to choose from cost it one pass a question. Ours is asked for no more than ``hf`` says: ``whole_sequence`` is
off, and ``seconds_whole_sequence`` is what it takes with it. Answers are compared: log-likelihoods to 1e-4 a token,
generated text exactly, but for a first different token that is a tie.

Tokens: ``asked`` of all requests by themselves; ``unique`` in their prefix tree, the least that has to be computed;
``computed`` by our engine; ``hf_computed`` by the other, padding included. Of generation all but ``hf_computed`` are of
prompts alone.

The bound is what perfect sharing would give: hf's seconds over those that the unique tokens take in plain forward
passes of our model on full rows, measured in turn with hf's; for BPB, of which every token is scored, with the loss of
all. To this, generation adds our seconds behind the first new token (those of the whole less those of a run that stops
there). ``reached`` is the ratio over the bound.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from evaluation_requests import BENCHMARKS, Requests, make_requests
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from train_step import processor

from lightning_dsv3.checkpoint import load_for_inference, save_hf_checkpoint
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.data import load_tokenizer, save_tokenizer
from lightning_dsv3.evaluation.engine import TokenCounts
from lightning_dsv3.evaluation.lm import DSV3LM
from lightning_dsv3.evaluation.lm_text import text_encoder
from lightning_dsv3.model import DeepSeekV3

# `batched_mm` copies the experts' matrices for every token: in a pass over prompts it takes many times as long.
EXPERTS = ("eager", "grouped_mm")
# Nats a token that float32 may part two implementations.
TOLERANCE = 1e-4
# Gap of two logits that either side may take for the larger.
TIE = 1e-3
MAX_LENGTH = 4096
# Rows and tokens of a row in the plain passes.
PASS = (8, 512)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="which")
    parser.add_argument("--checkpoint", type=Path, help="a run folder or checkpoint")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--subjects", type=int, default=3, help="subjects of CMMLU and MMLU")
    parser.add_argument("--questions", type=int, default=50, help="questions of a subject")
    parser.add_argument("--documents", type=int, default=80, help="questions of C3")
    parser.add_argument("--texts", type=int, default=20, help="documents of BPB")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of CMRC and GSM8K")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens of a generated answer at most")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes that hf tries")
    parser.add_argument("--batch", default="auto", help="our batch size")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = export(Path(name), arguments.checkpoint)
        sides = Sides(folder, arguments)
        rows = [sides.measure(benchmark) for benchmark in arguments.benchmarks]
    result = {
        "question": "lm-eval's request phase: the dsv3 model over hf on equal weights (ratio above 1: ours is faster)",
        "command": " ".join(["python benchmarks/evaluation.py", *(sys.argv[1:] if words is None else words)]),
        "machine": {"processor": processor(), "threads": arguments.threads},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "lm_eval": lm_eval.__version__,
        },
        "model": str(arguments.checkpoint or "random weights, shape of the tiny preset"),
        "dtype": arguments.dtype,
        "forward_tokens_per_second": sides.forward_rates,
        "rows": rows,
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def export(folder: Path, checkpoint: Path | None) -> Path:
    """Write weights and tokenizer as both sides read them; random weights have a sharp head, as trained ones do."""
    if checkpoint is None:
        torch.manual_seed(0)
        model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", max_position_embeddings=MAX_LENGTH))
        model.head.weight.data.mul_(16)
        tokenizer = load_tokenizer(model.config.vocab_size)
    else:
        loaded = load_for_inference(checkpoint)
        model, tokenizer = loaded.model, loaded.tokenizer
    save_hf_checkpoint(model, folder)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    names = {kind: tokenizer.id_to_token(index) for index, kind in enumerate(("bos_token", "eos_token", "pad_token"))}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    # Without it hf's rows go on behind the end of a text while others of their batch are written.
    ends = {kind.replace("token", "token_id"): tokenizer.token_to_id(name) for kind, name in names.items()}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


class Sides:
    """Both models, and what is measured of them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.is_exact = arguments.dtype == "float32"
        self.ours = DSV3LM(
            checkpoint=folder, dtype=arguments.dtype, device="cpu", batch_size=arguments.batch, whole_sequence=False
        )
        self.hf = HFLM(
            pretrained=str(folder), dtype=arguments.dtype, device="cpu", batch_size=1, max_length=self.ours.max_length,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.hf_tokens = 0
        self.hf.model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.forward_rates = self._forward_rates()
        rates = ", ".join(f"{side} {rate:,.0f}" for side, rate in self.forward_rates.items())
        print(f"plain forward passes, tokens/s: {rates}\n")
        print(f"{'':<8}{'seconds':>16}{'':>8}{'':>8}{'':>9}{'tokens, thousands':>40}{'saved':>9}{'hf':>18}")
        print(
            f"{'':<8}{'ours':>8}{'hf':>8}{'ratio':>8}{'bound':>8}{'reached':>9}{'asked':>10}{'unique':>10}"
            f"{'computed':>10}{'hf':>10}{'':>9}{'batch, experts':>18}"
        )

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.hf_tokens += ids.numel()

    def _forward_rates(self) -> dict[str, float]:
        """Alternate plain passes; hf's with all logits, which lm-eval reads."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.hf.model.config.vocab_size, PASS, generator=generator)
        passes: dict[str, Callable[[], Any]] = {
            "ours": lambda: self.ours._model(ids, return_logits=False),
            "ours_scoring": lambda: self.ours._model(ids, labels=ids, return_logits=False, use_mtp=False),
            "hf": lambda: self.hf.model(ids, use_cache=False),
        }
        best = min(EXPERTS, key=lambda experts: self._with(experts, lambda: timed(passes["hf"])[0]))
        self.hf.model.set_experts_implementation(best)
        seconds: dict[str, list[float]] = {side: [] for side in passes}
        for _ in range(2 * self.arguments.rounds):
            for side, run in passes.items():
                seconds[side].append(timed(run)[0])
        return {side: ids.numel() / statistics.median(times) for side, times in seconds.items()}

    def _with(self, experts: str, run: Callable[[], float]) -> float:
        self.hf.model.set_experts_implementation(experts)
        return run()

    def measure(self, name: str) -> dict[str, Any]:
        """Alternate both sides on a benchmark and return its row."""
        arguments = self.arguments
        documents = {"c3": arguments.documents, "bpb": arguments.texts}.get(name, arguments.prompts)
        requests = make_requests(
            name,
            subjects=arguments.subjects,
            questions=arguments.questions,
            documents=documents,
            new_tokens=arguments.new_tokens,
        )
        settings = self._tune(requests)
        self.run("ours", requests, requests.instances[:8])  # warm-up
        seconds: dict[str, list[float]] = {"ours": [], "hf": []}
        for _ in range(arguments.rounds):
            self.ours._engine.counts = TokenCounts()
            self.hf_tokens = 0
            answers: dict[str, list[Any]] = {}
            for side in seconds:
                elapsed, answers[side] = timed(lambda side=side: self.run(side, requests))  # type: ignore[misc]
                seconds[side].append(elapsed)
        counts = self.ours._engine.counts
        row: dict[str, Any] = {
            "benchmark": name, "requests": requests.source, "number_of_requests": len(requests.instances),
            "tokens_asked": counts.asked, "tokens_unique": counts.unique, "tokens_computed": counts.computed,
            "hf_tokens_computed": self.hf_tokens, "computed_over_unique": counts.computed / counts.unique,
            "seconds": statistics.median(seconds["ours"]), "hf_seconds": statistics.median(seconds["hf"]),
            "ratio": statistics.median(h / o for o, h in zip(seconds["ours"], seconds["hf"], strict=True)),
            "hf_settings": settings,
        }  # fmt: skip
        scores_all = requests.kind == "loglikelihood_rolling"
        least = counts.unique / self.forward_rates["ours_scoring" if scores_all else "ours"]
        if requests.kind == "generate_until":
            row |= self._first_tokens(requests)
            least += max(0.0, row["seconds"] - row["seconds_to_first_token"])
        else:
            row["seconds_tokenising"] = timed(lambda: self._tokenise(requests))[0]
        if requests.kind == "loglikelihood":
            self.ours._whole_sequence = True
            row["seconds_whole_sequence"] = timed(lambda: self.run("ours", requests))[0]
            self.ours._whole_sequence = False
        row["bound"] = row["hf_seconds"] / least
        row["reached"] = row["ratio"] / row["bound"]
        row |= self._compare(requests, answers) if self.is_exact else self._flips(requests)
        print(
            f"{name:<8}{row['seconds']:>8.2f}{row['hf_seconds']:>8.2f}{row['ratio']:>8.2f}{row['bound']:>8.2f}"
            f"{row['reached']:>9.0%}{row['tokens_asked'] / 1e3:>10.1f}{row['tokens_unique'] / 1e3:>10.1f}"
            f"{row['tokens_computed'] / 1e3:>10.1f}{row['hf_tokens_computed'] / 1e3:>10.1f}"
            f"{1 - row['tokens_computed'] / row['tokens_asked']:>9.0%}"
            f"{settings['batch']:>7} {settings['experts']}",
            flush=True,
        )
        for key in ("seconds_whole_sequence", "choices_flipped", "largest_difference_of_batches", "equal_texts"):
            if key in row:
                print(f"        {key}: {row[key]}")
        return row

    def run(self, side: str, requests: Requests, instances: Sequence[Instance] | None = None) -> list[Any]:
        """Have one side answer, ours without what it remembers of texts."""
        lm = self.ours if side == "ours" else self.hf
        self.ours._encode = text_encoder(self.ours.tokenizer)
        with redirect_stderr(io.StringIO()):  # progress bars of rolling log-likelihoods, whatever disable_tqdm says
            answers: list[Any] = getattr(lm, requests.kind)(list(instances or requests.instances), disable_tqdm=True)
        return answers

    def _tune(self, requests: Requests) -> dict[str, Any]:
        """Find hf's quickest batch size and experts on part of the requests, whole documents of them."""
        documents = requests.by_document()
        few = documents[:: max(1, len(documents) // max(8, max(self.arguments.batches)))]
        part = [requests.instances[number] for numbers in few for number in numbers]
        if requests.kind == "generate_until":
            part = [self._of_length(instance, 16) for instance in part]

        def seconds(batch: int, experts: str) -> float:
            self.hf.batch_size_per_gpu = batch
            return self._with(experts, lambda: timed(lambda: self.run("hf", requests, part))[0])

        start = self.arguments.batches[len(self.arguments.batches) // 2]
        at_start = {kind: seconds(start, kind) for kind in EXPERTS}
        experts = min(at_start, key=at_start.__getitem__)
        by_batch = {n: seconds(n, experts) if n != start else at_start[experts] for n in self.arguments.batches}
        batch = min(by_batch, key=by_batch.__getitem__)
        self.hf.batch_size_per_gpu = batch
        self.hf.model.set_experts_implementation(experts)
        return {"batch": batch, "experts": experts, "attention": self.hf.model.config._attn_implementation}

    @staticmethod
    def _of_length(instance: Instance, new_tokens: int) -> Instance:
        prompt, options = instance.args
        return Instance(instance.request_type, instance.doc, (prompt, {**options, "max_gen_toks": new_tokens}), 0)

    def _first_tokens(self, requests: Requests) -> dict[str, float]:
        """Time runs that stop at the first new token."""
        one = [self._of_length(instance, 1) for instance in requests.instances]
        seconds: dict[str, list[float]] = {"ours": [], "hf": []}
        for _ in range(self.arguments.rounds):
            for side, times in seconds.items():
                times.append(timed(lambda side=side: self.run(side, requests, one))[0])  # type: ignore[misc]
        return {
            "seconds_to_first_token": statistics.median(seconds["ours"]),
            "hf_seconds_to_first_token": statistics.median(seconds["hf"]),
        }

    def _tokenise(self, requests: Requests) -> None:
        self.ours._encode = text_encoder(self.ours.tokenizer)
        for instance in requests.instances:
            if requests.kind == "loglikelihood":
                self.ours._encode_pair(*instance.args)
            else:
                self.ours.tok_encode(instance.args[0])

    def _compare(self, requests: Requests, answers: dict[str, list[Any]]) -> dict[str, Any]:
        """Hold the answers against each other.

        Raises:
            RuntimeError: They are not the same.
        """
        pairs = list(zip(requests.instances, answers["ours"], answers["hf"], strict=True))
        if requests.kind == "generate_until":
            different = [(instance.args[0], ours, hf) for instance, ours, hf in pairs if ours != hf]
            for prompt, ours, hf in different:
                if (gap := self._gap_where_they_part(prompt, ours, hf)) > TIE:
                    raise RuntimeError(f"different text, {gap:.4f} nats apart:\n{ours!r}\n{hf!r}")
            return {"equal_texts": 1 - len(different) / len(pairs), "ties": len(different)}
        worst = 0.0
        for instance, ours, hf in pairs:
            text = instance.args[-1]
            tokens = len(self.ours.tok_encode(text, add_special_tokens=False))
            both = (ours, hf) if requests.kind == "loglikelihood_rolling" else (ours[0], hf[0])
            apart = abs(both[0] - both[1]) / max(1, tokens)
            if not apart <= TOLERANCE:  # nor nan
                raise RuntimeError(f"log-likelihoods {both[0]} and {both[1]} are {apart:.2e} nats a token apart")
            worst = max(worst, apart)
        return {"largest_difference_per_token": worst}

    def _gap_where_they_part(self, prompt: str, ours: str, hf: str) -> float:
        """Return how far the logits of two texts' first different tokens are apart."""
        start = self.ours.tok_encode(prompt)[-(self.ours.max_length - self.arguments.new_tokens) :]
        made = [self.ours.tok_encode(text, add_special_tokens=False) for text in (ours, hf)]
        same = next((i for i, (a, b) in enumerate(zip(*made, strict=False)) if a != b), min(map(len, made)))
        if same == min(map(len, made)):
            return math.inf  # one text goes on where the other has been cut
        logits = self.ours._model(torch.tensor([[*start, *made[0][:same]]])).logits[0, -1].float()
        return float((logits[made[0][same]] - logits[made[1][same]]).abs())

    def _flips(self, requests: Requests) -> dict[str, Any]:
        """Return, for each side, the share of documents whose choice is not the same for all batch sizes."""
        if requests.kind != "loglikelihood":
            return {}
        documents = requests.by_document()
        flipped, apart = {}, {}
        for side in ("ours", "hf"):
            chosen, scores = [], []
            for batch in self.arguments.batches:
                self.ours._engine.max_rows = self.hf.batch_size_per_gpu = batch
                scores.append([pair[0] for pair in self.run(side, requests)])
                chosen.append([max(numbers, key=lambda number: scores[-1][number]) for numbers in documents])
            flipped[side] = sum(len(set(choices)) > 1 for choices in zip(*chosen, strict=True)) / len(documents)
            apart[side] = max(max(values) - min(values) for values in zip(*scores, strict=True))
        self.ours._engine.max_rows = self.ours.batch_size
        return {
            "choices_flipped": flipped,
            "largest_difference_of_batches": apart,
            "documents": len(documents),
            "batches": list(self.arguments.batches),
        }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, and what it returned."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
