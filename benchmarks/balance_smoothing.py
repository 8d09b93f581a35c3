"""How uneven is the load of a micro-batch, by its tokens, and of the micro-batches of many ranks together?

    python benchmarks/balance_smoothing.py --output benchmarks/results/balance_smoothing.json
    python benchmarks/balance_smoothing.py --checkpoint runs/<run>/checkpoints/last.ckpt

The bias rule balances the batch of a training step. A device is as busy as the tokens of its micro-batch make it, and
these are few, and mostly of one kind: the first of the report's two challenges of batch-wise balance (section 4.5.3).
Its answer is large expert and data parallelism. This measures both sides of it on held-out text:

* MaxVio of micro-batches of 256 to 65,536 tokens, drawn from all domains or from one.
* The busiest GPU over the mean, with a layer's experts on 2 to E GPUs in order, when 1 to 256 ranks give a micro-batch
  of fixed size each to these experts. A rank's sequences are drawn from all domains, or all from one.

Both are the mean over the layers, then the mean and the spread over micro-batches. Beside them stands what chance alone
would give: counts of as many tokens for which every choice is independent and every expert equally likely.

Without ``--checkpoint`` the default run is trained first (``examples/train.py``, minutes on two cores); words behind
``--`` are passed to it. Sequences that hold padding are left out. Everything is counted, so that a busy machine changes
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from balance_on_off import train
from train_step import processor

from lightning_dsv3 import DeepSeekV3DataModule, DeepSeekV3Module
from lightning_dsv3.balance import RouterObserver, find_routers
from lightning_dsv3.config import load_run_config
from lightning_dsv3.data.packing import IGNORED_LABEL
from lightning_dsv3.ops.balance import max_violation
from lightning_dsv3.plots import plot_balance_smoothing

MIXED = "all domains"
ONE_DOMAIN = "one domain"
MICRO_BATCH_TOKENS = [2**n for n in range(8, 17)]
RANKS = [2**n for n in range(9)]
SEQUENCES_PER_RANK = 4
ROWS = 8  # sequences per forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of a run folder: RUN/checkpoints/last.ckpt")
    parser.add_argument("--shuffles", type=int, default=20, help="orders in which the sequences are cut up")
    parser.add_argument("--seed", type=int, default=0, help="of the orders and of the floor")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--figure", type=Path, help="PNG of the result")
    parser.add_argument("words", nargs="*", help="key=value words for the run that is trained, behind --")
    arguments = parser.parse_args()
    if arguments.checkpoint and arguments.words:
        parser.error(f"words behind -- are for a run to be trained; --checkpoint {arguments.checkpoint} is one already")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or train(Path(folder), arguments.words) / "checkpoints" / "last.ckpt"
        run = checkpoint.resolve().parent.parent
        if not (run / "config.yaml").is_file():
            parser.error(
                f"--checkpoint {checkpoint}: {run} is no run folder (no config.yaml); give RUN/checkpoints/x.ckpt"
            )
        result = measure(checkpoint, run, arguments.shuffles, arguments.seed)
    result = {
        "question": "MaxVio by tokens of a micro-batch and by ranks that are pooled",
        "command": "python benchmarks/balance_smoothing.py"
        + (" --checkpoint RUN/checkpoints/last.ckpt" if arguments.checkpoint else ""),
        "words": arguments.words,
        "machine": {"processor": processor()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
    } | result  # fmt: skip
    show(result)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        plot_balance_smoothing(result, arguments.figure)


def measure(checkpoint: Path, run: Path, shuffles: int, seed: int) -> dict[str, Any]:
    """Route the held-out text of a run with its model and return the figures."""
    config = load_run_config([f"config={run / 'config.yaml'}"])
    length = config.train.sequence_length
    module = DeepSeekV3Module.load_from_checkpoint(checkpoint, map_location="cpu")
    model = module.model.eval()
    data = DeepSeekV3DataModule(config.data, vocab_size=config.model.vocab_size, sequence_length=length)
    data.setup()
    counts = {domain: route(model, ids_NS) for domain, ids_NS in held_out_sequences(data).items()}
    fewest = min(map(len, counts.values()))
    counts = {domain: counts_NLE[_spread(len(counts_NLE), fewest)] for domain, counts_NLE in counts.items()}
    chosen = config.model.num_experts_per_tok
    summary = json.loads((run / "summary.json").read_text())
    return {
        "model": {
            "trained_tokens": summary["tokens"], "trained_with": summary["versions"],
            "layers": next(iter(counts.values())).shape[1],
            "experts": config.model.n_routed_experts, "experts_per_token": chosen,
            "training_batch_tokens": config.train.batch_size * length,
            "training_batch_max_violation": summary["max_violation"]["training_batch_end"],
        },
        "sequence": length,
        "sequences_per_domain": fewest,
        "rank_tokens": SEQUENCES_PER_RANK * length,
        "shuffles": shuffles,
        "seed": seed,
        "micro_batches": by_tokens(counts, MICRO_BATCH_TOKENS, length, chosen, shuffles, seed),
        "ranks": by_ranks(counts, RANKS, SEQUENCES_PER_RANK, length, chosen, shuffles, seed),
    }  # fmt: skip


def held_out_sequences(data: DeepSeekV3DataModule) -> dict[str, Tensor]:
    """Return the test sequences of each domain that have no padding, int64 ``[N, S]``."""
    loaders = data.test_dataloader()
    rows: dict[str, list[Tensor]] = {domain: [] for domain in data.domains}
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        for batch in loader:
            is_full_B = (batch["labels"][:, 1:] != IGNORED_LABEL).all(dim=1)
            for ids_S, domain in zip(batch["input_ids"][is_full_B], batch["domain"][is_full_B].tolist(), strict=True):
                rows[data.domains[domain]].append(ids_S)
    return {domain: torch.stack(sequences) for domain, sequences in rows.items()}


@torch.no_grad()
def route(model: torch.nn.Module, ids_NS: Tensor) -> Tensor:
    """Return how many tokens of each sequence chose each expert of each layer, int64 ``[N, L, E]``.

    The layers are those that the main model runs: without labels there is no MTP.
    """
    routers = find_routers(model)
    parts = []
    for ids_BS in ids_NS.split(ROWS):
        observer = RouterObserver(routers, training=False, num_groups=len(ids_BS))
        observer.attach()
        observer.start(ids_BS.device)
        observer.open(torch.arange(len(ids_BS)))
        model(ids_BS, return_logits=False)
        counts = [
            counts_BE
            for counts_BE, chosen in zip(observer.take(), observer.num_experts_per_tok, strict=True)
            if chosen  # 0: the layer has not run
        ]
        observer.detach()
        parts.append(torch.stack(counts, dim=1))
    return torch.cat(parts)


def added_up(counts_NLE: Tensor, size: int) -> Tensor:
    """Return the counts of ``size`` neighbouring rows together, ``[N // size, L, E]``; rows that are left over drop."""
    whole = len(counts_NLE) // size
    return counts_NLE[: whole * size].unflatten(0, (whole, size)).sum(dim=1)


def violation(counts_MLE: Tensor, num_gpus: int) -> Tensor:
    """Return the busiest GPU's load over the mean, less 1: float ``[M]``, the mean over the layers.

    With as many GPUs as experts it is MaxVio. GPU g has the experts ``g * E / num_gpus`` and those that follow.
    """
    return max_violation(counts_MLE.unflatten(-1, (num_gpus, -1)).sum(dim=-1)).mean(dim=-1)


def floor(tokens: int, chosen: int, layers: int, experts: int, num_gpus: int, seed: int, draws: int = 400) -> float:
    """Return the mean violation of ``tokens`` that choose at random, all experts equally likely."""
    rng = np.random.default_rng([seed, tokens, num_gpus])
    counts = rng.multinomial(tokens * chosen, np.full(experts, 1 / experts), size=(draws, layers))
    return float(violation(torch.from_numpy(counts), num_gpus).mean())


def statistics(values_M: Tensor) -> dict[str, float]:
    """Return mean, standard deviation and the middle 80 % of violations."""
    values = values_M.double()
    low, high = values.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return {"mean": float(values.mean()), "std": float(values.std(correction=0)), "p10": low, "p90": high}


def orders(number: int, shuffles: int, seed: int) -> Iterator[Tensor]:
    """Yield random orders of ``number`` rows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(shuffles):
        yield torch.randperm(number, generator=generator)


def by_tokens(
    counts: Mapping[str, Tensor], sizes: Sequence[int], length: int, chosen: int, shuffles: int, seed: int
) -> list[dict[str, Any]]:
    """Return MaxVio by tokens of a micro-batch, for sequences of all domains and of each.

    Args:
        counts: Counts of each domain's sequences, int64 ``[N, L, E]``, as many for each domain.
        sizes: Tokens of a micro-batch, multiples of ``length``.
        length: Tokens of a sequence.
        chosen: Experts per token.
        shuffles: Random orders of the sequences, each cut into as many micro-batches as there are.
        seed: Of the orders and of the floor.
    """
    rows = []
    texts = {MIXED: torch.cat(list(counts.values()))} | dict(counts)
    for text, counts_NLE in texts.items():
        for tokens in sizes:
            together = tokens // length
            if together > len(counts_NLE):
                continue
            values = [
                violation(added_up(counts_NLE[order], together), counts_NLE.shape[-1])
                for order in orders(len(counts_NLE), shuffles, seed)
            ]
            rows.append(
                {"text": text, "tokens": tokens, "disjoint": len(counts_NLE) // together}
                | statistics(torch.cat(values))
                | {"floor": floor(tokens, chosen, *counts_NLE.shape[1:], counts_NLE.shape[-1], seed)}
            )
    return rows


def by_ranks(
    counts: Mapping[str, Tensor],
    ranks: Sequence[int],
    together: int,
    length: int,
    chosen: int,
    shuffles: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the violation of the busiest GPU by ranks that share the experts, on 2, 4, ... and E GPUs.

    Args:
        counts: As in :func:`by_tokens`.
        ranks: Numbers of ranks whose micro-batches are added up.
        together: Sequences in a rank's micro-batch.
        length: Tokens of a sequence.
        chosen: Experts per token.
        shuffles: Random orders, of the sequences and of the ranks.
        seed: Of the orders and of the floor.
    """
    layers, experts = next(iter(counts.values())).shape[1:]
    gpus = sorted({2**n for n in range(1, int(math.log2(experts)) + 1) if experts % 2**n == 0} | {experts})
    values: dict[tuple[str, int, int], list[Tensor]] = {}
    per_domain = len(next(iter(counts.values())))
    for number, order in enumerate(orders(per_domain * len(counts), shuffles, seed)):
        alone = [
            added_up(counts_NLE[_of_domain(order, i, per_domain)], together)
            for i, counts_NLE in enumerate(counts.values())
        ]
        of_one = torch.cat(alone)
        shuffled = next(orders(len(of_one), 1, seed + 1 + number))
        rank_counts = {
            MIXED: added_up(torch.cat(list(counts.values()))[order], together),
            ONE_DOMAIN: of_one[shuffled],
        }
        for reads, counts_RLE in rank_counts.items():
            for pooled in ranks:
                if pooled > len(counts_RLE):
                    continue
                pool_MLE = added_up(counts_RLE, pooled)
                for num_gpus in gpus:
                    values.setdefault((reads, num_gpus, pooled), []).append(violation(pool_MLE, num_gpus))
    return [
        {"rank_reads": reads, "gpus": num_gpus, "ranks": pooled, "tokens": pooled * together * length}
        | statistics(torch.cat(found))
        | {"floor": floor(pooled * together * length, chosen, layers, experts, num_gpus, seed)}
        for (reads, num_gpus, pooled), found in sorted(values.items())
    ]


def _spread(number: int, taken: int) -> Tensor:
    """Return ``taken`` of ``number`` rows, evenly spread."""
    return torch.arange(taken) * number // taken


def _of_domain(order: Tensor, domain: int, per_domain: int) -> Tensor:
    """Return the order of one domain's sequences within an order of all of them."""
    return order[order // per_domain == domain] % per_domain


def show(result: Mapping[str, Any]) -> None:
    """Print the figures as two tables."""
    print(f"{'MaxVio of a micro-batch':<26}{'tokens':>9}{'mean':>8}{'std':>8}{'chance':>8}")
    for row in result["micro_batches"]:
        print(f"{row['text']:<26}{row['tokens']:>9,}{row['mean']:>8.3f}{row['std']:>8.3f}{row['floor']:>8.3f}")
    print(f"\n{'busiest GPU over the mean':<26}{'GPUs':>6}{'ranks':>6}{'mean':>8}{'std':>8}{'chance':>8}")
    for row in result["ranks"]:
        print(
            f"{'ranks of ' + row['rank_reads']:<26}{row['gpus']:>6}{row['ranks']:>6}{1 + row['mean']:>8.3f}"
            f"{row['std']:>8.3f}{1 + row['floor']:>8.3f}"
        )


if __name__ == "__main__":
    main()
