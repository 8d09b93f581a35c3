"""Are drafts of the MTP modules worth their cost? ``generate.py`` runs it as its part ``speculation``.

Plain decoding and 1, 2 and 3 drafts a round alternate on held-out text of each domain, a prompt alone and all prompts
as one batch; greedy texts must be the same. Beside the ratio stands what decides it: how many drafts are accepted, and
what a round costs, in passes over one token of each row: the pass that verifies K + 1 tokens of each row, and K drafts.
Drafts pay where a round gives more tokens than it costs passes; the acceptance where both are equal is the break-even,
for K above 1 that of every position alike. In a batch rows accept different numbers and then have different lengths,
which makes their rounds a little dearer than the costs say.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from generate_parts import in_turn, median_ratio
from torch import Tensor

from lightning_dsv3 import DeepSeekV3DataModule
from lightning_dsv3.checkpoint import load_for_inference
from lightning_dsv3.config import load_run_config
from lightning_dsv3.inference import LatentCache, MTPDrafter, extend, generate
from lightning_dsv3.inference.drafting import Choice
from lightning_dsv3.inference.sampling import verify_greedy
from lightning_dsv3.metrics import MTPAcceptance
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.ops.acceptance import break_even_acceptance, tokens_per_pass

ROOT = Path(__file__).resolve().parents[1]
DRAFTS = (1, 2, 3)
# What a greedy choice may hang on where two computations differ by rounding; logits have a deviation near 1.
TIE = 1e-3


@torch.no_grad()
def same_text(model: DeepSeekV3, mine: Tensor, other: Tensor, prompt_length: int) -> int:
    """Return how many rows part, all at ties within rounding.

    Raises:
        RuntimeError: A row parts where the choice was clear.
    """
    parted = 0
    for row, (a, b) in enumerate(zip(mine, other, strict=True)):
        if torch.equal(a, b):
            continue
        parted += 1
        position = int((a != b).nonzero()[0])
        logits = model.head(model(a[None, :position], return_logits=False).hidden[0, -1])
        margin = float((logits[a[position]] - logits[b[position]]).abs())
        if position < prompt_length or margin > TIE:
            raise RuntimeError(f"row {row}, token {position}: the two texts part, by {margin} of a logit")
    return parted


def measure_speculation(
    checkpoint: Path | None, train_steps: int | None, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Print and return how fast drafts are, for a trained model or else one that is trained here."""
    given = checkpoint is not None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint or train_default_run(Path(folder), train_steps)
        model = load_for_inference(checkpoint).model
    prompts = held_out_prompts(model.config.vocab_size)
    print(f"\n{'drafts':<14}{'tokens/s':>18}{'':>9}{'tokens':>10}{'accepted':>20}{'break-':>8}{'cost of':>17}")
    print(f"{'batch, number':<14}{'plain':>9}{'drafts':>9}{'ratio':>9}{'per pass':>10}{'at positions':>20}{'even':>8}"
          f"{'verifying':>10}{'drafts':>7}")  # fmt: skip
    everything = torch.cat(list(prompts.values()))
    rows = []
    for groups in ([(d, row[None]) for d, ids in prompts.items() for row in ids], [("all", everything)]):
        for row in speculate(model, groups, new_tokens, repeats):
            rows.append(row)
            accepted = " ".join(f"{a:.2f}" for a in row["acceptance"])
            even = "never" if row["break_even_acceptance"] is None else f"{row['break_even_acceptance']:.2f}"
            print(
                f"{row['batch']:>5}, {row['drafts']:<7}{row['plain_tokens_per_second']:>9,.0f}"
                f"{row['tokens_per_second']:>9,.0f}{row['ratio']:>9.2f}{row['tokens_per_pass']:>10.2f}{accepted:>20}"
                f"{even:>8}{row['verify_cost']:>10.2f}{row['draft_cost']:>7.2f}",
                flush=True,
            )
    return {"model": "a checkpoint that was given" if given else "the default run, trained here",
        "train_steps": train_steps, "prompts": {d: list(ids.shape) for d, ids in prompts.items()},
            "new_tokens": new_tokens, "rows": rows}  # fmt: skip


def train_default_run(folder: Path, steps: int | None) -> Path:
    """Train what ``examples/train.py`` trains by default, or fewer steps of it, and return the run's folder."""
    run = load_run_config([]).train
    words = [] if steps is None else [f"train.total_tokens={steps * run.sequence_length * run.batch_size}"]
    print(f"\ntraining the default run {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return next((folder / "runs").iterdir())


def held_out_prompts(vocab_size: int, length: int = 64, rows: int = 2) -> dict[str, Tensor]:
    """Return the beginnings of texts of each domain that were not trained on, ``[rows, length]``."""
    data = DeepSeekV3DataModule(vocab_size=vocab_size, sequence_length=length, batch_size=rows)
    data.prepare_data()
    data.setup()
    found: dict[str, list[Tensor]] = {domain: [] for domain in data.domains}
    loaders = data.val_dataloader()
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        for batch in loader:
            for ids, labels, domain in zip(batch["input_ids"], batch["labels"], batch["domain"], strict=True):
                kept = found[data.domains[int(domain)]]
                if len(kept) < rows and torch.equal(ids, labels):  # without padding
                    kept.append(ids)
    return {domain: torch.stack(kept) for domain, kept in found.items()}


def speculate(
    model: DeepSeekV3, groups: Sequence[tuple[str, Tensor]], new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Alternate plain decoding with 1, 2 and 3 drafts a round, for each group of prompts by itself."""
    batch, length = groups[0][1].shape
    counts = {k: MTPAcceptance(k) for k in DRAFTS}
    by_domain = {(k, domain): MTPAcceptance(k) for k in DRAFTS for domain, _ in groups}
    plain_seconds, ratios = 0.0, {k: [] for k in DRAFTS}
    seconds = dict.fromkeys(DRAFTS, 0.0)
    ties = dict.fromkeys(DRAFTS, 0)
    for domain, ids in groups:
        plain = generate(model, ids, max_new_tokens=new_tokens)
        for k in DRAFTS:
            told = MTPAcceptance(k)
            text = generate(model, ids, max_new_tokens=new_tokens, speculative=True, num_drafts=k, acceptance=told)
            ties[k] += same_text(model, plain, text, length)
            for metric in (counts[k], by_domain[k, domain]):
                metric.update(told.num_drafted, told.num_accepted)
        runs: dict[int, Callable[[], Tensor]] = {0: lambda ids=ids: generate(model, ids, max_new_tokens=new_tokens)}
        for k in DRAFTS:
            runs[k] = lambda ids=ids, k=k: generate(
                model, ids, max_new_tokens=new_tokens, speculative=True, num_drafts=k
            )
        taken = in_turn(runs, max(1, repeats // 5), warm_up=False)
        plain_seconds += statistics.median(taken[0])
        for k in DRAFTS:
            seconds[k] += statistics.median(taken[k])
            ratios[k].append(median_ratio(taken[0], taken[k]))
    tokens = new_tokens * batch * len(groups)
    costs = draft_costs(model, groups[0][1], repeats)
    rows = []
    for k in DRAFTS:
        acceptance = counts[k].compute().view(-1)
        domains = {domain: by_domain[k, domain].compute().view(-1).tolist() for domain, _ in groups}
        rows.append({
            "batch": batch, "drafts": k, "plain_tokens_per_second": tokens / plain_seconds,
            "tokens_per_second": tokens / seconds[k], "ratio": plain_seconds / seconds[k],
            "ratio_by_prompt": ratios[k], "acceptance": acceptance.tolist(), "acceptance_by_domain": domains,
            "tokens_per_pass": float(tokens_per_pass(acceptance)), **costs[k],
            "break_even_acceptance": break_even(costs[k]["verify_cost"], costs[k]["draft_cost"], k),
            "rows_parted_at_ties": ties[k],
        })  # fmt: skip
    return rows


def draft_costs(model: DeepSeekV3, prompts: Tensor, repeats: int) -> dict[int, dict[str, float]]:
    """Time a pass over K + 1 tokens of each row, and K drafts, in passes over one token."""
    batch, length = prompts.shape
    cache = LatentCache(model.config, batch)
    output = extend(model, cache, prompts)

    def greedy(logits: Tensor) -> Choice:
        return Choice(logits.argmax(dim=-1), None)

    def verify(k: int) -> None:
        logits = model.head(extend(model, cache, prompts[:, : k + 1]).hidden)
        verify_greedy(logits, prompts[:, :k], torch.full((batch,), k))
        cache.truncate([length] * batch)

    runs: dict[Any, Callable[[], object]] = {("verify", k): lambda k=k: verify(k) for k in (0, *DRAFTS)}
    for k in DRAFTS:
        drafter = MTPDrafter(model, batch, k)
        states = drafter.states(output)
        drafter.draft(states, prompts, [length] * batch, greedy)
        runs["draft", k] = lambda drafter=drafter, states=states: drafter.draft(
            states[:, -1:], prompts[:, -1:], [1] * batch, greedy
        )
    seconds = in_turn(runs, 2 * repeats)
    plain = seconds["verify", 0]
    return {k: {f"{name}_cost": median_ratio(seconds[name, k], plain) for name in ("verify", "draft")} for k in DRAFTS}


def break_even(verify_cost: float, draft_cost: float, drafts: int) -> float | None:
    """Return the acceptance, the same at each position, above which drafts pay; None if none does."""
    if drafts == 1:
        even = break_even_acceptance(verify_cost, draft_cost)
        return even if even <= 1 else None
    tried = (n / 1000 for n in range(1001))
    return next((a for a in tried if tokens_per_pass([a] * drafts) >= verify_cost + draft_cost), None)
