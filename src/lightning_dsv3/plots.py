"""Every figure: learning curves, MaxVio, and the relative expert load by domain and layer of the report's Figure 9.

matplotlib is optional (``pip install 'lightning-dsv3[plots]'``) and used without its global state, so that figures
can be drawn in any process and thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_dsv3.config import Schedule

_INSTALL = "figures need matplotlib: pip install 'lightning-dsv3[plots]'"
History = Sequence[Mapping[str, float]]


def plotting_problem() -> str | None:
    """Return why figures cannot be drawn here, or None."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a broken numpy raises more than ImportError
        return f"{_INSTALL} ({error})"
    return None


def plot_loss(history: History, path: Path) -> None:
    """Draw training and held-out loss in nats per token over tokens seen.

    Args:
        history: Rows of ``metrics.csv`` as numbers.
        path: PNG to write.
    """
    figure, axes = _figure()
    for key, label in {"train/loss": "train", "train/mtp_loss": "train, MTP", "val/loss": "held out"}.items():
        tokens, values = _series(history, key)
        if values:
            axes.plot(tokens, values, label=label, marker="o" if key.startswith("val") else None, markersize=3)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title="Loss")
    _finish(figure, axes, path)


def plot_bits_per_byte(history: History, compressors: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw held-out bits per byte by domain, with the compressors' figures on the same text as dotted lines.

    Args:
        history: Rows of ``metrics.csv`` as numbers.
        compressors: ``{domain: {compressor: bits per byte}}``.
        path: PNG to write.
    """
    figure, axes = _figure()
    for number, (domain, others) in enumerate(compressors.items()):
        colour = f"C{number}"
        tokens, values = _series(history, f"val/{domain}/bpb")
        axes.plot(tokens, values, color=colour, marker="o", markersize=3, label=domain)
        for compressor, value in others.items():
            style = ":" if compressor == "gzip" else "--"
            label = f"{compressor} on the same text" if number == 0 else None
            axes.axhline(value, color=colour, linestyle=style, linewidth=0.9, alpha=0.7, label=label)
    axes.set(xlabel="tokens seen", ylabel="bits per byte", title="Held-out bits per byte by domain")
    _finish(figure, axes, path)


def plot_max_violation(history: History, path: Path) -> None:
    """Draw MaxVio of each optimizer step's batch: each layer thin, their mean thick.

    Args:
        history: Rows of ``metrics.csv`` as numbers.
        path: PNG to write.
    """
    figure, axes = _figure()
    keys = {key for row in history for key in row if fnmatch(key, "moe/*/max_violation")}
    for key in sorted(keys):
        tokens, values = _series(history, key)
        layer = key.removeprefix("moe/").removesuffix("/max_violation")
        axes.plot(tokens, values, linewidth=0.8, alpha=0.7, label=layer)
    tokens, values = _series(history, "moe/max_violation")
    axes.plot(tokens, values, color="black", linewidth=1.8, label="mean of layers")
    axes.set(
        xlabel="tokens seen", ylabel="MaxVio = max load / mean load - 1", title="Load violation per training batch"
    )
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def plot_schedules(schedules: Mapping[str, Schedule], total_tokens: int, path: Path) -> None:
    """Draw schedules over a run's tokens, one panel each; what happens in its first tenth is drawn large beside it.

    Args:
        schedules: What follows the tokens, by the name of its axis.
        total_tokens: Length of the run.
        path: PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    bends = [end for schedule in schedules.values() for end in _bends(schedule)]
    early = max((end for end in bends if end < 0.1 * total_tokens), default=None)
    columns = {"the whole run": float(total_tokens)}
    if early is not None:
        columns = {"the beginning": 1.15 * early, **columns}
    figure = Figure(figsize=(3 + 5 * len(columns), 1.9 * len(schedules)), layout="constrained")
    all_axes = figure.subplots(
        len(schedules), len(columns), sharex="col", sharey="row", squeeze=False, width_ratios=[2, 3][-len(columns) :]
    )
    for row, (name, schedule) in zip(all_axes, schedules.items(), strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axes, last in zip(row, columns.values(), strict=True):
            axes.plot(*_curve(schedule, last))
            axes.set_ylim(bottom=0)
            axes.set_xlim(0, last)
            axes.grid(alpha=0.3)
    for axes, title in zip(all_axes[0], columns, strict=True):
        axes.set_title(title, fontsize=10)
    for axes in all_axes[-1]:
        axes.set_xlabel("tokens seen")
        # 10e12 tokens are written as in the report, 10T; the engineers' letter for 10**9 is G.
        axes.xaxis.set_major_formatter(lambda tokens, _: EngFormatter(sep="")(tokens).replace("G", "B"))
    figure.align_ylabels()
    figure.suptitle("Schedules over tokens", fontsize=11)
    save_figure(figure, path)


def _bends(schedule: Schedule) -> list[float]:
    """Return the marks at which a schedule is not level on both sides."""
    return [
        mark.until
        for mark in schedule.marks
        if mark.shape != "constant" or schedule(mark.until) != schedule(math.nextafter(mark.until, math.inf))
    ]


def _curve(schedule: Schedule, last: float) -> tuple[list[float], list[float]]:
    """Return tokens up to ``last`` and the schedule there."""
    # Between marks a fine grid; at a mark the value on both sides, so that a jump is drawn as one.
    points = {last * index / 1000 for index in range(1001)}
    points |= {end for mark in schedule.marks for end in (mark.until, math.nextafter(mark.until, math.inf))}
    tokens = sorted(point for point in points if point <= last)
    return tokens, [schedule(point) for point in tokens]


def plot_expert_load(loads: Mapping[str, Any], path: Path) -> None:
    """Draw the relative expert load by layer and domain; see :func:`expert_load_figure`.

    Args:
        loads: ``loads.json``.
        path: PNG to write.
    """
    save_figure(expert_load_figure(loads), path)


def expert_load_figure(loads: Mapping[str, Any]) -> Any:
    """Draw the relative expert load by layer and domain (report, Figure 9): 1 is balanced, darker is busier.

    Up to 16 layers have a heat map each, with a row per domain, as in the report. More layers are the rows of one
    heat map per domain, so that a figure of 58 layers still fits a screen or two.

    Args:
        loads: ``loads.json``: counts per domain and layer; layers may have different numbers of experts.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    layers, domains = loads["layers"], loads["domains"]
    relative = {
        (layer, domain): _relative(loads["counts"][domain][i]) for i, layer in enumerate(layers) for domain in domains
    }
    by_layer = len(layers) <= 16
    maps, rows = (layers, domains) if by_layer else (domains, layers)
    row_height = 0.24 if by_layer else 0.12
    height = 0.9 + len(maps) * (0.45 + row_height * len(rows))
    figure = Figure(figsize=(10, height), layout="constrained")
    all_axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    image = None
    for title, axes in zip(maps, all_axes, strict=True):
        values = [relative[(title, row) if by_layer else (row, title)] for row in rows]
        width = max(map(len, values))
        padded = [row + [float("nan")] * (width - len(row)) for row in values]
        image = axes.imshow(padded, aspect="auto", cmap="Blues", vmin=0, vmax=4, interpolation="nearest")
        axes.set_yticks(range(len(rows)), rows, fontsize=8 if by_layer else 6)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
    all_axes[-1].set_xlabel("expert")
    figure.suptitle("Relative expert load by domain on held-out text (1 = balanced)", fontsize=11)
    if image is not None:
        bar = figure.colorbar(
            image,
            ax=list(all_axes),
            label="load / mean load",
            extend="max",
            extendfrac=0.02,
            shrink=0.8,
            aspect=max(20, 3 * height),  # no wider in a tall figure
        )
        bar.ax.tick_params(labelsize=7)
    return figure


def _relative(counts: Sequence[int]) -> list[float]:
    mean = sum(counts) / len(counts)
    return [count / mean if mean else float("nan") for count in counts]


def plot_balance_smoothing(result: Mapping[str, Any], path: Path) -> None:
    """Draw how the load evens out with the tokens that are counted together (report, section 4.5.3).

    On the left MaxVio by tokens of a micro-batch, mean of the layers with the middle 80 % of micro-batches; on the
    right the busiest GPU over the mean by ranks that share the experts, each with a micro-batch of one domain. Dashed:
    what chance gives where every expert is equally likely.

    Args:
        result: What ``benchmarks/balance_smoothing.py`` writes.
        path: PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = result["micro_batches"]
    for number, text in enumerate(dict.fromkeys(row["text"] for row in rows)):
        of_text = [row for row in rows if row["text"] == text]
        colour, width = ("black", 1.8) if number == 0 else (f"C{number - 1}", 1.2)
        tokens = [row["tokens"] for row in of_text]
        label = text if number == 0 else f"{text} alone"
        left.plot(tokens, [row["mean"] for row in of_text], color=colour, linewidth=width, marker=".", label=label)
        low, high = [row["p10"] for row in of_text], [row["p90"] for row in of_text]
        left.fill_between(tokens, low, high, color=colour, alpha=0.1, linewidth=0)
    of_chance = {row["tokens"]: row["floor"] for row in rows}
    left.plot(*zip(*sorted(of_chance.items()), strict=True), color="grey", linestyle="--", label="chance alone")
    left.set(xlabel="tokens of the micro-batch", ylabel="MaxVio", title="Busiest expert of a micro-batch", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())

    rows = [row for row in result["ranks"] if row["rank_reads"] == "one domain"]
    for number, gpus in enumerate(sorted({row["gpus"] for row in rows}, reverse=True)):
        of_gpus = [row for row in rows if row["gpus"] == gpus]
        ranks = [row["ranks"] for row in of_gpus]
        per_gpu = result["model"]["experts"] // gpus
        label = f"{gpus} GPUs, {per_gpu} expert{'s' if per_gpu > 1 else ''} each"
        right.plot(ranks, [1 + row["mean"] for row in of_gpus], color=f"C{number}", marker=".", label=label)
        right.plot(ranks, [1 + row["floor"] for row in of_gpus], color=f"C{number}", linestyle="--", linewidth=0.8)
    right.plot([], [], color="grey", linestyle="--", label="chance alone")
    right.set(
        xlabel=f"ranks, each with {result['rank_tokens']:,} tokens of one domain",
        ylabel="load of the busiest GPU / mean load",
        title="Busiest GPU of ranks that share the experts",
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save_figure(figure, path, dpi=100)  # as wide as a page of documentation


def plot_placement(
    imbalance: Mapping[str, Sequence[float]],
    gpu_loads: Mapping[str, npt.NDArray[np.floating[Any]]],
    layers: Sequence[str],
    path: Path,
) -> None:
    """Draw what a plan of redundant experts does: the imbalance of every layer, and the GPUs of the worst one.

    Args:
        imbalance: Busiest GPU's load over the mean, by layer, for each placement.
        gpu_loads: Load of each GPU ``[L, G]`` for some placements, the first of which tells the worst layer.
        layers: Names of the layers.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in imbalance.items():
        style = {"color": "black", "linestyle": "--", "linewidth": 1} if name == "bound" else {"marker": "o"}
        left.plot(range(len(layers)), values, markersize=3, label=name, **style)
    shown = range(0, len(layers), max(1, len(layers) // 12))
    left.set_xticks(shown, [layers[index] for index in shown], rotation=45, ha="right", fontsize=7)
    left.set(ylabel="busiest GPU's load / mean", title="Imbalance by layer")
    first = next(iter(gpu_loads.values()))
    worst = int(np.argmax(first.max(axis=1) / np.maximum(first.mean(axis=1), 1e-300)))
    for name, loads in gpu_loads.items():
        relative = np.sort(loads[worst])[::-1] / max(loads[worst].mean(), 1e-300)
        right.step(range(1, len(relative) + 1), relative, where="mid", label=name)
    right.axhline(1, color="black", linestyle="--", linewidth=1)
    right.set(xlabel="GPU, from the busiest", ylabel="load / mean", title=f"GPUs in {layers[worst]}")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_drift(
    imbalance: Mapping[str, Sequence[float]],
    moved: Mapping[str, Sequence[int]],
    domains: Sequence[str],
    path: Path,
) -> None:
    """Draw plans of redundant experts under a load that drifts between domains: imbalance, and experts moved.

    Args:
        imbalance: Busiest GPU's load over the mean at each step, for each strategy.
        moved: Experts loaded before each step, for each strategy.
        domains: Domains on the way, at equal distances.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    num_steps = len(next(iter(imbalance.values())))
    for number, (name, values) in enumerate(imbalance.items()):
        style = {"color": "black", "linestyle": "--"} if name == "bound" else {"color": f"C{number}"}
        top.plot(range(num_steps), values, label=name, **style)
        total = np.cumsum(moved.get(name, [0]))
        if total[-1]:
            bottom.step(range(num_steps), total, where="post", label=name, **style)
    top.set(ylabel="busiest GPU's load / mean", title="Imbalance while the load drifts, mean of layers")
    bottom.set(xlabel="step; traffic", ylabel="experts loaded")
    places = np.linspace(0, num_steps - 1, len(domains))
    bottom.set_xticks(places, [f"{place:g}\n{domain}" for place, domain in zip(places, domains, strict=True)])
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_benchmarks(
    scores: Mapping[str, Mapping[str, tuple[float, float | None]]],
    panels: Mapping[str, Sequence[str]],
    results: Sequence[str],
    path: Path,
    same_level: Mapping[str, float] | None = None,
) -> None:
    """Draw scores by benchmark: published models as open marks, results as filled ones with two standard errors.

    Errors that reach beyond all scores are cut.

    Args:
        scores: Score and its standard error, if known, by column and benchmark; or differences of scores.
        panels: Benchmarks from the top down, by the label of their axis; a panel without any is left out.
        results: Columns that are results.
        path: PNG to write.
        same_level: For differences: which of them are none, up to this, by the label of the axis.
    """
    from matplotlib.figure import Figure

    shown = {label: benchmarks for label, benchmarks in panels.items() if benchmarks}
    heights = [len(benchmarks) + 1.5 for benchmarks in shown.values()]
    figure = Figure(figsize=(9, 1.2 + 0.26 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    marks = {name: "osD^vP*X<>"[number % 10] for number, name in enumerate(scores)}
    for axes, (label, benchmarks) in zip(all_axes, shown.items(), strict=True):
        for number, (name, column) in enumerate(scores.items()):
            places = [place for place, benchmark in enumerate(benchmarks) if benchmark in column]
            of_column = [column[benchmarks[place]] for place in places]
            colour, filled = f"C{number % 10}", name in results
            axes.errorbar(
                [value for value, _ in of_column],
                # Results that agree would hide each other.
                [place + (0.12 * (results.index(name) + 1) if filled else 0) for place in places],
                xerr=[2 * (stderr or 0) for _, stderr in of_column] if filled else None,
                linestyle="none",
                marker=marks[name],
                markersize=6,
                color=colour,
                markerfacecolor=colour if filled else "none",
                label=name,
            )
        axes.set_yticks(range(len(benchmarks)), benchmarks, fontsize=8)
        axes.set_ylim(len(benchmarks) - 0.4, -0.6)
        values = [column[benchmark][0] for column in scores.values() for benchmark in benchmarks if benchmark in column]
        if same_level is not None:
            axes.axvspan(-same_level[label], same_level[label], color="grey", alpha=0.3, linewidth=0)
            values += [-same_level[label], same_level[label]]
        margin = 0.05 * ((max(values) - min(values)) or 1)
        axes.set_xlim(min(values) - margin, max(values) + margin)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 130) -> None:
    """Write a figure as PNG, complete or not at all; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=dpi, format="png")
    temporary.replace(path)


def figure_pixels(figure: Any) -> npt.NDArray[np.uint8]:
    """Return a figure as an image, red, green and blue: uint8 ``[height, width, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    save_figure(figure, path)


def _series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Return tokens seen and values of the rows that have the key; a validation has the tokens logged before it."""
    tokens, values = [], []
    last = 0.0
    for row in history:
        last = row.get("train/tokens", last)
        if key in row:
            tokens.append(last)
            values.append(row[key])
    return tokens, values
