"""How fast is generation, beside Hugging Face's on equal weights and beside what memory allows, and what decides it?

    python benchmarks/generate.py                                     all parts
    python benchmarks/generate.py --part decode                       prefill and decoding by context and batch
    python benchmarks/generate.py --part crossover                    absorbed against expanded attention
    python benchmarks/generate.py --part experts                      one token through more and more experts
    python benchmarks/generate.py --part mtp_dropped                  trained with MTP modules, or without
    python benchmarks/generate.py --part speculation                  drafts; trains the default run first
    python benchmarks/generate.py --part speculation --checkpoint runs/RUN
    python benchmarks/generate.py --output benchmarks/results/generate.json

Float32 on a CPU. Sides alternate step by step in one process; seconds are medians, and a ratio is the median of the
ratios pair by pair, which stands where a shared machine's speed drifts. Hugging Face runs with its own cache and
``generate``, attention ``sdpa``, and of its expert implementations the one that is the quickest here, found anew for
each batch, for prefill and for decoding.

The bound of a step is the bytes it cannot do without over the bandwidth measured around it: every weight that is not an
expert's, an embedding row per text, the experts that were really chosen, and the cached latents, each read once.
Bandwidth is that of a large copy, read and written bytes together, and that of a large sum, which only reads.

Where it would take minutes, Hugging Face makes fewer steps (``hf_new_tokens``), a long prompt is run for fewer rows
(``prefill_rows``, and the cache repeated before decoding), and ``generate`` is left out (null).
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from generate_parts import (
    bandwidth,
    in_turn,
    measure_crossover,
    measure_experts,
    measure_mtp_dropped,
    median_ratio,
    num_bytes,
    timed,
)
from generate_speculation import TIE, measure_speculation, same_text
from torch import Tensor
from train_step import processor

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference import LatentCache, extend, generate
from lightning_dsv3.layers.moe import MixtureOfExperts
from lightning_dsv3.model import DeepSeekV3

# 286M parameters, a fifth of them activated: far more than a cache holds, so that a step reads memory.
MODEL: dict[str, Any] = {
    "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 256,
    "num_hidden_layers": 6, "first_k_dense_replace": 1, "num_attention_heads": 16, "q_lora_rank": 384,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 8192, "initializer_range": 0.02,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        choices=["all", "decode", "crossover", "experts", "mtp_dropped", "speculation"],
        default="all",
        help="what is measured",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096], help="tokens of a prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="texts at a time")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--hf-seconds", type=float, default=15.0, help="Hugging Face's decoding of a cell at the most")
    parser.add_argument("--prefill-tokens", type=int, default=16384, help="prompt tokens of a cell at the most")
    parser.add_argument("--generate-tokens", type=int, default=4096, help="prompt tokens of a whole generate at most")
    parser.add_argument("--repeats", type=int, default=15, help="counted runs of the other parts, each side")
    parser.add_argument("--checkpoint", type=Path, help="a run folder or checkpoint of the default run")
    parser.add_argument("--train-steps", type=int, help="steps of the run that is trained without one")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parts = {
        "decode": lambda: measure_decode(arguments),
        "crossover": lambda: measure_crossover(MODEL, arguments.contexts, arguments.repeats),
        "experts": lambda: measure_experts(MODEL, arguments.repeats),
        "mtp_dropped": lambda: measure_mtp_dropped(MODEL, arguments.repeats),
        "speculation": lambda: measure_speculation(
            arguments.checkpoint, arguments.train_steps, arguments.new_tokens, arguments.repeats
        ),
    }
    with torch.no_grad():
        measured = {name: part() for name, part in parts.items() if arguments.part in (name, "all")}
    result = {
        "question": "generation in float32: ours, Hugging Face's (a ratio above 1: ours is faster), the memory's bound",
        "command": " ".join(["python benchmarks/generate.py", *(sys.argv[1:] if words is None else words)]),
        "machine": {"processor": processor(), "threads": arguments.threads},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        **measured,
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


class Ours:
    """This package's model and its latent cache."""

    def __init__(self, model: DeepSeekV3) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = LatentCache(self.model.config, ids.shape[0])
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        """Run tokens ``[B, S]`` and return the likeliest that follows, ``[B, 1]``."""
        output = extend(self.model, self.cache, ids)
        self.routing = output.routing
        self.logits = self.model.head(output.hidden[:, -1])
        return self.logits.argmax(dim=-1, keepdim=True)

    def repeat(self, times: int) -> None:
        self.cache = self.cache.select([row for row in range(self.cache.batch_size) for _ in range(times)])

    def cache_bytes(self) -> tuple[int, int]:
        """Return the bytes that are allocated, and those that hold tokens."""
        values = self.model.config.kv_lora_rank + self.model.config.qk_rope_head_dim
        return self.cache.num_bytes, self.cache.num_layers * sum(self.cache.lengths) * values * 4

    def generate(self, ids: Tensor, count: int) -> Tensor:
        return generate(self.model, ids, max_new_tokens=count)


class HuggingFace:
    """Hugging Face's model with the same weights, and its default cache."""

    def __init__(self, ours: DeepSeekV3) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_hf_checkpoint(ours, folder)
            self.model = transformers.DeepseekV3ForCausalLM.from_pretrained(
                folder, attn_implementation="sdpa", dtype=torch.float32
            ).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        # Renamed in transformers 5.
        named = "cache" in inspect.signature(self.model.forward).parameters
        self._name = "cache" if named else "past_key_values"

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = None
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        output = self.model(ids, use_cache=True, logits_to_keep=1, **{self._name: self.cache})
        self.cache, self.logits = getattr(output, self._name), output.logits[:, -1]
        return self.logits.argmax(dim=-1, keepdim=True)

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)

    def cache_bytes(self) -> tuple[int, int]:
        size = sum(num_bytes(t) for layer in self.cache.layers for t in (layer.keys, layer.values))
        return size, size

    def generate(self, ids: Tensor, count: int) -> Tensor:
        # Without a mask it would take tokens of the padding's number for padding.
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True
        )

    def use_experts(self, name: str) -> None:
        self.model.set_experts_implementation(name)

    def choose_experts(self, batch: int) -> dict[str, str]:
        """Return the quickest expert implementation for prefill and for decoding."""
        prompt = torch.randint(0, self.model.config.vocab_size, (batch, 128))
        # batched_mm copies every pair's weights, which a prompt's pairs have no memory for.
        prefill = self._quickest(("eager", "grouped_mm"), lambda: self.prefill(prompt))
        decode = self._quickest(("eager", "grouped_mm", "batched_mm"), lambda: self.step(prompt[:, :1]))
        return {"prefill": prefill, "decode": decode}

    def _quickest(self, names: Sequence[str], run: Callable[[], object]) -> str:
        seconds = {}
        for name in names:
            self.use_experts(name)
            run()
            seconds[name] = min(timed(run)[0] for _ in range(3))
        return min(seconds, key=lambda name: seconds[name])


def measure_decode(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    config = DeepSeekV3Config(**MODEL)
    ours = Ours(DeepSeekV3(config).eval())
    hf = HuggingFace(ours.model)
    count = config.num_parameters()
    print(f"{count.total / 1e6:.0f}M parameters, {count.activated / 1e6:.0f}M activated, {arguments.threads} threads\n")
    print(f"{'':<14}{'prefill, tokens/s':>24}{'decode, tokens/s':>25}{'':>8}{'share of bound':>18}{'cache, MB':>16}")
    print(
        f"{'context, batch':<14}{'ours':>8}{'HF':>8}{'ratio':>8}{'ours':>9}{'HF':>8}{'ratio':>8}{'bound':>8}"
        f"{'copy':>10}{'read':>8}{'ours':>8}{'HF':>8}"
    )
    rows = []
    for batch in arguments.batches:
        experts = hf.choose_experts(batch)
        for context in arguments.contexts:
            row = decode_cell(ours, hf, context, batch, experts, arguments)
            rows.append(row)
            print(
                f"{f'{context}, {batch}':<14}{row['ours_prefill_tokens_per_second']:>8,.0f}"
                f"{row['hf_prefill_tokens_per_second']:>8,.0f}{row['prefill_ratio']:>8.2f}"
                f"{row['ours_decode_tokens_per_second']:>9,.1f}{row['hf_decode_tokens_per_second']:>8,.1f}"
                f"{row['decode_ratio']:>8.2f}{row['bound_tokens_per_second']:>8,.0f}"
                f"{row['share_of_bound']:>10.0%}{row['share_of_read_bound']:>8.0%}"
                f"{row['ours_cache_bytes'] / 1e6:>8.1f}{row['hf_cache_bytes'] / 1e6:>8.1f}",
                flush=True,
            )
    seconds = {(row["context"], row["batch"]): row["ours_step_seconds"] for row in rows}
    growth = {
        f"batch {batch}": seconds[1024, batch] / seconds[128, batch]
        for batch in arguments.batches
        if {(128, batch), (1024, batch)} <= seconds.keys()
    }
    for row in rows:
        if row["ours_generate_seconds"] is not None:
            print(
                f"generate, {row['hf_new_tokens']} tokens behind {row['context']}, batch {row['batch']}: "
                f"{row['ours_generate_seconds']:.2f} s, HF {row['hf_generate_seconds']:.2f} s"
            )
    if growth:
        print("step at 1k over step at 128: " + ", ".join(f"{key} {value:.2f}" for key, value in growth.items()))
    return {"model": MODEL, "parameters": count.total, "step_at_1k_over_128": growth, "rows": rows}


def decode_cell(
    ours: Ours, hf: HuggingFace, context: int, batch: int, experts: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure one context and batch: prefill, then steps in turn, then ``generate`` as users call it."""
    config, sides = ours.model.config, {"ours": ours, "hf": hf}
    affordable = batch * context <= arguments.generate_tokens
    most = max(1, arguments.prefill_tokens // context)
    rows = max(r for r in range(1, min(batch, most) + 1) if batch % r == 0)
    ids = torch.randint(0, config.vocab_size, (rows, context))
    # Chosen at random, so that repeated rows part.
    first = torch.randint(0, config.vocab_size, (batch, 1))
    before = bandwidth()

    hf.use_experts(experts["prefill"])
    runs = {name: lambda side=side: side.prefill(ids) for name, side in sides.items()}
    for side in sides.values():
        side.prefill(ids[:, :128])
    prefill = in_turn(runs, 2 if affordable else 1, warm_up=False)
    if float((ours.logits - hf.logits).abs().max()) > TIE:
        raise RuntimeError(f"context {context}, batch {batch}: the two sides do not compute the same")
    for side in sides.values():
        side.repeat(batch // rows)
    hf.use_experts(experts["decode"])
    steps = decode_in_turn(ours, hf, first, arguments.new_tokens, arguments.hf_seconds)
    done = len(steps["hf"])

    copy, read = map(max, before, bandwidth())
    # A step reads what there is before it, and its own.
    needed = step_bytes(ours.model, steps["chosen"], batch, context + (arguments.new_tokens + 1) / 2)
    step = {name: statistics.median(steps[name]) for name in sides}
    row = {
        "context": context, "batch": batch, "prefill_rows": rows, "new_tokens": arguments.new_tokens,
        "hf_new_tokens": done, "hf_experts": experts,
        "prefill_ratio": median_ratio(prefill["hf"], prefill["ours"]),
        "decode_ratio": median_ratio(steps["hf"], steps["ours"]),
        "copy_bytes_per_second": copy, "read_bytes_per_second": read, "bytes_per_step": needed,
        "experts_read_per_layer": statistics.mean(steps["chosen"]) / max(1, len(ours.routing)),
        "bound_tokens_per_second": batch * copy / needed["total"],
        "share_of_bound": needed["total"] / copy / step["ours"],
        "share_of_read_bound": needed["total"] / read / step["ours"],
        "hf_share_of_bound": needed["total"] / copy / step["hf"],
        "greedy": steps["greedy"],
    }  # fmt: skip
    for name, side in sides.items():
        row[f"{name}_prefill_tokens_per_second"] = rows * context / statistics.median(prefill[name])
        row[f"{name}_step_seconds"] = step[name]
        row[f"{name}_decode_tokens_per_second"] = batch / step[name]
        row[f"{name}_cache_bytes"], row[f"{name}_cache_bytes_used"] = side.cache_bytes()
    return row | whole_generate(ours, hf, ids, done, affordable=affordable)


def decode_in_turn(ours: Ours, hf: HuggingFace, first: Tensor, count: int, hf_seconds: float) -> dict[str, Any]:
    """Make steps in turn, each side from its own tokens; return seconds, chosen experts, and where texts part."""
    token = {"ours": first, "hf": first}
    steps: dict[str, Any] = {"ours": [], "hf": [], "chosen": []}
    parted: dict[int, dict[str, float]] = {}
    for index in range(count):
        seconds, token["ours"] = timed(lambda: ours.step(token["ours"]))
        steps["ours"].append(seconds)
        steps["chosen"].append(sum(r.expert_TK.unique().numel() for r in ours.routing))
        # At least a few, whatever they take.
        if index >= 4 and sum(steps["hf"]) > hf_seconds:
            continue
        seconds, token["hf"] = timed(lambda: hf.step(token["hf"]))
        steps["hf"].append(seconds)
        for row in (token["ours"] != token["hf"]).flatten().nonzero().flatten().tolist():
            if row not in parted:
                logits = ours.logits[row]
                margin = float(logits[token["ours"][row]] - logits[token["hf"][row]])
                parted[row] = {"token": index, "margin": margin}
                if margin > TIE:
                    raise RuntimeError(
                        f"row {row}, token {index}: the two sides choose otherwise, by {margin} of logit"
                    )
    steps["greedy"] = {"rows": first.shape[0], "tokens": len(steps["hf"]), "parted_at_ties": list(parted.values())}
    return steps


def whole_generate(ours: Ours, hf: HuggingFace, ids: Tensor, count: int, *, affordable: bool) -> dict[str, Any]:
    """Time ``generate`` of both, prompt and new tokens together."""
    if not affordable:
        return {"ours_generate_seconds": None, "hf_generate_seconds": None}
    ours_seconds, mine = timed(lambda: ours.generate(ids, count))
    hf_seconds, theirs = timed(lambda: hf.generate(ids, count))
    same_text(ours.model, mine, theirs, ids.shape[1])
    return {"ours_generate_seconds": ours_seconds, "hf_generate_seconds": hf_seconds}


def step_bytes(model: DeepSeekV3, chosen: Sequence[int], batch: int, context: float) -> dict[str, float]:
    """Count what a step has to read: ``chosen`` experts of all layers together, on average."""
    config = model.config
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    experts = [m.feed_forward.experts for m in model.blocks if isinstance(m.feed_forward, MixtureOfExperts)]
    expert = sum(num_bytes(p[0]) for p in experts[0].parameters()) if experts else 0
    parts = {
        "weights": sum(
            num_bytes(t)
            for n, t in tensors.items()
            if not n.startswith(("embedding.", "mtp.")) and ".experts." not in n
        ),
        "embedding": batch * num_bytes(model.embedding.weight[0]),
        "experts": expert * statistics.mean(chosen),
        "cache": config.num_hidden_layers * batch * context * (config.kv_lora_rank + config.qk_rope_head_dim) * 4,
    }
    return parts | {"total": sum(parts.values())}


if __name__ == "__main__":
    main()
