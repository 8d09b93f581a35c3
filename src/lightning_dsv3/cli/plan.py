"""``dsv3 plan``: redundant experts for inference, from measured loads to a plan; and a drift replayed through plans."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_dsv3.cli.dsv3 import table
from lightning_dsv3.config import ConfigError, DeepSeekV3Config, preset_names, read_preset
from lightning_dsv3.config.errors import did_you_mean
from lightning_dsv3.inference.load_tables import LoadTable, read_load_table
from lightning_dsv3.inference.load_trace import STRATEGIES, Simulation, drift, simulate, unplanned
from lightning_dsv3.inference.placement import POLICIES, Placement, PlacementError, lower_bound, plan_placement
from lightning_dsv3.inference.placement_files import ENGINES, engine_form, load_placement, save_placement, write_json
from lightning_dsv3.inference.placement_policies import Floats
from lightning_dsv3.inference.replanning import DTYPE_BYTES, align, expert_bytes, moved_experts, replan

_PLAN = """\
Plans redundant experts for serving with expert parallelism (report, section 3.4): from the load of every expert, how
many replicas each gets and on which GPU they are, so that GPUs are equally busy. An expert's load is shared evenly by
its replicas. Imbalance is the busiest GPU's load over the mean: 1 is balanced, at 1.5 the experts of a layer take half
as long again.

"dsv3 plan simulate LOADS ..." replays a load that drifts between domains through plans; it has its own --help.
"""

_PLAN_EPILOG = """\
LOADS is a run folder, a loads.json of a run or an evaluation, or a .csv: a row per layer, a column per expert; a
first row and a first column of names may be there.

columns of the table:
  before         experts in order, without replicas where they divide between the GPUs; with --from the old plan
  published      what the published algorithm (deepseek-ai/EPLB) gives: hierarchical where the groups can be shared out
                 between the nodes, else global
  balanced       the plan: never two replicas of an expert on one GPU while that is possible
  bound          no plan is below it
  replicas       of the expert that has most

forms (--format):
  json           ours: the maps and where they come from; --from reads it. A name that ends in .safetensors gives
                 the same as three int64 tensors
  sglang         physical_to_logical_map with a row for every layer of the model, for --init-expert-location FILE.json
  vllm-ascend    moe_layer_count and layer_list with the experts of each device, for expert_map_path
  vllm           physical_to_logical_map and its two inverses, as arrays. vLLM plans by itself
                 (--eplb-config '{"num_redundant_experts": 32}') and, as far as we know, reads no file: this is for
                 code that sets its maps
  The last three follow the engines' public documentation and sources; they were not run against servers.

examples:
  dsv3 plan runs/20261125-101500-tiny --gpus 8 --slots 40
  dsv3 plan loads.json --preset prefill --output plan.json --figure plan.png
  dsv3 plan loads.csv --preset decode --experts-per-token 8 --output plan.safetensors
  dsv3 plan loads.json --gpus 32 --nodes 4 --groups 8 --slots 288 --keep-groups
  dsv3 plan loads.json --preset prefill --domain-weights english=0.7,code=0.3
  dsv3 plan new.json --preset prefill --from plan.json --model 671b --output plan2.json     what moved, in bytes
  dsv3 plan loads.json --preset prefill --format sglang --model 671b --output experts.json
"""

_SIMULATE = """\
Replays a load that drifts from domain to domain through plans, and prints the imbalance over time: without a plan,
with one plan for the whole mixture, with plans from scratch, and with plans changed in steps. A new plan knows only
the loads since the one before it. Numbers are means over the layers.
"""

_SIMULATE_EPILOG = """\
LOADS is a run folder or its loads.json: loads by domain, measured on held-out text.

examples:
  dsv3 plan simulate runs/20261125-101500-tiny --gpus 8 --slots 40
  dsv3 plan simulate loads.json --preset prefill --model 671b --figure drift.png
  dsv3 plan simulate loads.json --gpus 8 --slots 40 --domains english,code,english --steps 100 --interval 5
"""


def plan(words: Sequence[str]) -> int:
    """Plan redundant experts, or simulate a drift."""
    try:
        return _simulate(words[1:]) if words and words[0] == "simulate" else _plan(words)
    except PlacementError as error:
        raise ConfigError(str(error)) from error


def _plan(words: Sequence[str]) -> int:
    parser = _parser("plan", _PLAN, _PLAN_EPILOG)
    parser.add_argument("--policy", choices=POLICIES, default="balanced", help="how to place; balanced")
    parser.add_argument(
        "--domain-weights", metavar="D=W,...", help="the traffic to plan for; by default the counts as they are"
    )
    parser.add_argument(
        "--from", dest="old", type=Path, metavar="PLAN", help="change this plan in steps, moving few experts"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the plan")
    parser.add_argument("--format", choices=("json", *ENGINES), default="json", help="form of the plan; json")
    options = parser.parse_args(words)
    _check_figure(options.figure)
    if options.format != "json" and options.output is None:
        raise ConfigError(f"--format {options.format}: give --output FILE.json as well")
    loads = read_load_table(options.loads)
    cluster, loads = _cluster(options, loads)
    load_LE = loads.mixture(_weights(options.domain_weights))
    published = plan_placement(
        load_LE, num_slots=cluster["num_slots"], num_gpus=cluster["num_gpus"], num_nodes=cluster["num_nodes"],
        num_groups=cluster["num_groups"], policy="hierarchical",
    )  # fmt: skip
    if options.old is None:
        before = unplanned(len(load_LE), load_LE.shape[1], cluster["num_slots"], cluster["num_gpus"])
        placement = plan_placement(load_LE, policy=options.policy, **cluster)
    else:
        before = _old_plan(options, cluster, load_LE)
        placement = replan(before, load_LE, tolerance=options.tolerance, max_moves=options.max_moves)
    placement = _named(placement, loads.layers)
    name = options.policy if options.old is None else "re-planned"
    columns = {
        "before": before.imbalance(load_LE).tolist(),
        "published": published.imbalance(load_LE).tolist(),
        name: placement.imbalance(load_LE).tolist(),
        "bound": lower_bound(load_LE, num_slots=cluster["num_slots"], num_gpus=cluster["num_gpus"]).tolist(),
    }
    _print_layers(loads.layers, columns, placement)
    if options.old is not None:
        _print_moves(options, before, placement, plan_placement(load_LE, **cluster))
    _print_warnings(placement, columns, name)
    if options.output is not None:
        _write(options, placement, loads, cluster)
    if options.figure is not None:
        from lightning_dsv3.plots import plot_placement

        loads_by_gpu = {"before": before.gpu_load(load_LE).numpy(), name: placement.gpu_load(load_LE).numpy()}
        _draw(options.figure, lambda path: plot_placement(columns, loads_by_gpu, loads.layers, path))
    return 0


def _simulate(words: Sequence[str]) -> int:
    parser = _parser("plan simulate", _SIMULATE, _SIMULATE_EPILOG)
    parser.add_argument(
        "--domains", metavar="D,D,...", help="the way of the drift; by default all, in the file's order"
    )
    parser.add_argument("--steps", type=int, default=61, metavar="N", help="length of the drift; 61")
    parser.add_argument("--interval", type=int, default=5, metavar="N", help="steps between plans; 5")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers")
    options = parser.parse_args(words)
    _check_figure(options.figure)
    loads = read_load_table(options.loads)
    cluster, loads = _cluster(options, loads)
    domains = options.domains.split(",") if options.domains else list(loads.by_domain)
    for domain in domains:
        if domain not in loads.by_domain:
            raise ConfigError(
                f"--domains: no domain {domain!r} in {loads.origin}; {did_you_mean(domain, loads.by_domain)}"
            )
    trace = drift([loads.by_domain[domain] for domain in domains], options.steps)
    result = simulate(
        trace, interval=options.interval, tolerance=options.tolerance, max_moves=options.max_moves, **cluster
    )
    _print_simulation(options, result, domains)
    if options.output is not None:
        content = {
            "format": 1,
            "source": {"loads": loads.origin, "domains": domains} | cluster,
            "imbalance": {name: values.mean(dim=1).tolist() for name, values in result.imbalance.items()},
            "bound": result.bound.mean(dim=1).tolist(),
            "moved": {name: values.tolist() for name, values in result.moved.items()},
        }
        _draw(options.output, lambda path: write_json(path, content), "--output", "wrote")
    if options.figure is not None:
        from lightning_dsv3.plots import plot_drift

        series = {name: values.mean(dim=1).tolist() for name, values in result.imbalance.items()}
        moved = {name: values.tolist() for name, values in result.moved.items()}
        bound = result.bound.mean(dim=1).tolist()
        _draw(options.figure, lambda path: plot_drift(series | {"bound": bound}, moved, domains, path))
    return 0


def _parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser with the words that both commands have."""
    parser = argparse.ArgumentParser(
        prog=f"dsv3 {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("loads", type=Path, metavar="LOADS", help="run folder, loads.json or .csv")
    known = " | ".join(preset_names("plan"))
    parser.add_argument(
        "--preset", metavar="NAME|FILE", help=f"a deployment of the report ({known}), or a YAML file of yours"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that share the experts")
    parser.add_argument("--slots", type=int, metavar="N", help="physical experts on all GPUs together")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes that the GPUs are in; 1")
    parser.add_argument("--groups", type=int, metavar="N", help="groups of experts, the router's n_group; 1")
    parser.add_argument(
        "--keep-groups", action="store_true", help="balanced plans keep a group in one node, as hierarchical ones do"
    )
    parser.add_argument(
        "--shared-expert", action="store_true", help="place the shared expert too, as one more that every token chooses"
    )
    parser.add_argument(
        "--experts-per-token", type=int, metavar="K", help="routed experts of a token, where the file does not tell"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="X",
        help="re-planning stops this near to a plan from scratch; 0.02",
    )
    parser.add_argument("--max-moves", type=int, metavar="N", help="experts that one re-planning may load; no limit")
    parser.add_argument("--model", metavar="NAME|FILE", help="model preset: size of an expert, layers (dsv3 presets)")
    parser.add_argument(
        "--dtype", choices=DTYPE_BYTES, default="fp8", help="type of the experts' weights, for bytes moved; fp8"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    return parser


def _cluster(options: argparse.Namespace, loads: LoadTable) -> tuple[dict[str, Any], LoadTable]:
    """Return the deployment as arguments of plan_placement, and the loads with the shared expert if it is placed."""
    values: dict[str, Any] = {"gpus": None, "slots": None, "nodes": 1, "groups": 1, "shared_expert": False}
    if options.preset is not None:
        preset = read_preset("plan", options.preset)
        if unknown := sorted(set(preset) - set(values)):
            raise ConfigError(
                f"--preset {options.preset}: unknown key {unknown[0]!r}; {did_you_mean(unknown[0], values)}"
            )
        values |= preset
    values |= {
        key: given for key in ("gpus", "slots", "nodes", "groups") if (given := getattr(options, key)) is not None
    }
    for key in ("gpus", "slots"):
        if values[key] is None:
            raise ConfigError(
                f"--{key}: missing; give it, or a deployment by --preset {' | '.join(preset_names('plan'))}"
            )
    num_experts = next(iter(loads.by_domain.values())).shape[1]
    if options.model is not None and _model(options).n_routed_experts != num_experts:
        raise ConfigError(
            f"--model {options.model}: it has {_model(options).n_routed_experts} routed experts, and the loads have "
            f"{num_experts}; name the model that they were measured on"
        )
    if options.shared_expert or values["shared_expert"]:
        chosen = options.experts_per_token or loads.experts_per_token
        if chosen is None and options.model is not None:
            chosen = _model(options).num_experts_per_tok
        if chosen is None:
            raise ConfigError(
                "--experts-per-token: needed to tell the shared expert's load, which is 1 / K of the routed one"
            )
        if chosen < 1:
            raise ConfigError(f"--experts-per-token {chosen}: must be 1 or more")
        loads = loads.with_shared_expert(chosen)
    cluster = {
        "num_slots": values["slots"], "num_gpus": values["gpus"], "num_nodes": values["nodes"],
        "num_groups": values["groups"], "keep_groups": options.keep_groups,
    }  # fmt: skip
    return cluster, loads


def _old_plan(options: argparse.Namespace, cluster: Mapping[str, Any], load_LE: Floats) -> Placement:
    if options.policy != "balanced":
        raise ConfigError(f"--from: re-planning in steps is of policy balanced; leave --policy {options.policy} out")
    old = load_placement(options.old)
    for key, mine in (("gpus", old.num_gpus), ("slots", old.num_slots)):
        if mine != cluster[f"num_{key}"]:
            raise ConfigError(
                f"--from {options.old}: the plan has {mine} {key}, not {cluster[f'num_{key}']}; plan without --from"
            )
    if old.replica_counts.shape != load_LE.shape:
        raise ConfigError(
            f"--from {options.old}: the plan is for {list(old.replica_counts.shape)} [layers, experts], the loads are "
            f"{list(load_LE.shape)}; plan without --from"
        )
    return old


def _weights(words: str | None) -> dict[str, float] | None:
    if words is None:
        return None
    weights = {}
    for word in words.split(","):
        domain, _, value = word.partition("=")
        try:
            weights[domain] = float(value)
        except ValueError as error:
            raise ConfigError(f"--domain-weights: {word!r} is not of the form english=0.5") from error
    return weights


def _model(options: argparse.Namespace) -> DeepSeekV3Config:
    return DeepSeekV3Config.from_dict(read_preset("model", options.model))


def _named(placement: Placement, layers: tuple[str, ...]) -> Placement:
    from dataclasses import replace

    return replace(placement, layers=layers)


def _print_layers(layers: Sequence[str], columns: Mapping[str, Sequence[float]], placement: Placement) -> None:
    most = placement.replica_counts.amax(dim=1).tolist()
    rows = [["layer", *columns, "replicas"]]
    rows += [
        [layer, *(f"{values[row]:.4f}" for values in columns.values()), str(most[row])]
        for row, layer in enumerate(layers)
    ]
    rows.append(["mean", *(f"{sum(values) / len(values):.4f}" for values in columns.values()), ""])
    rows.append(["worst", *(f"{max(values):.4f}" for values in columns.values()), str(max(most))])
    print(table(rows, left=(0,)))
    experts, slots, gpus = placement.num_experts, placement.num_slots, placement.num_gpus
    print(
        f"\n{experts} experts in {slots} slots, {slots // gpus} on each of {gpus} GPUs; imbalance = busiest GPU / mean"
    )


def _print_moves(options: argparse.Namespace, old: Placement, new: Placement, fresh: Placement) -> None:
    steps, scratch = int(moved_experts(old, new).sum()), int(moved_experts(old, align(old, fresh)).sum())
    print(f"experts to load: {_amount(options, steps)}; with a plan from scratch: {_amount(options, scratch)}")


def _amount(options: argparse.Namespace, moves: int) -> str:
    if options.model is None:
        return f"{moves:,}"
    size = float(moves * expert_bytes(_model(options), options.dtype))
    power = min(len(str(int(size))) - 1, 14) // 3
    return f"{moves:,} ({size / 1000**power:,.4g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]})"


def _print_warnings(placement: Placement, columns: Mapping[str, Sequence[float]], name: str) -> None:
    twins = placement.twins
    if twins.any():
        room = placement.num_slots // placement.num_gpus
        reason = f"policy {name} does not avoid it"
        if not placement.twins_avoidable:
            reason = f"with {room} slots on a GPU and {placement.num_experts} experts it cannot be avoided"
        elif placement.keeps_groups:
            reason = "the experts that stay in a node are too few for its slots, or the policy does not avoid it"
        print(f"dsv3: {int(twins.sum())} replicas share a GPU with another of their expert: {reason}", file=sys.stderr)
    elif name == "balanced" and not placement.keeps_groups:
        above = [
            row for row, published in enumerate(columns["published"]) if columns[name][row] > published * (1 + 1e-9)
        ]
        if above:
            print(
                f"dsv3: in {len(above)} layers the published plan is more even, by means of two replicas of an expert "
                "on one GPU; --policy global takes it",
                file=sys.stderr,
            )


def _print_simulation(options: argparse.Namespace, result: Simulation, domains: Sequence[str]) -> None:
    num_steps = len(result.bound)
    means = {name: values.mean(dim=1).tolist() for name, values in result.imbalance.items()}
    means["bound"] = result.bound.mean(dim=1).tolist()
    rows = [["step", "traffic", *means]]
    for step in range(0, num_steps, max(1, num_steps // 12)):
        traffic = _traffic(step, num_steps, domains)
        rows.append([str(step), traffic, *(f"{values[step]:.4f}" for values in means.values())])
    rows.append(["mean", "", *(f"{sum(values) / num_steps:.4f}" for values in means.values())])
    rows.append(["worst", "", *(f"{max(values):.4f}" for values in means.values())])
    print(table(rows, left=(1,)))
    print(f"\nexperts loaded in {(num_steps - 1) // options.interval} re-plannings")
    for name in STRATEGIES[2:]:
        print(f"  {name:<20} {_amount(options, int(result.moved[name].sum()))}")


def _traffic(step: int, num_steps: int, domains: Sequence[str]) -> str:
    place = step * (len(domains) - 1) / (num_steps - 1)
    first = min(int(place), len(domains) - 2)
    part = place - first
    shares = [(domains[first], 1 - part), (domains[first + 1], part)]
    return ", ".join(f"{domain} {share:.0%}" for domain, share in shares if share > 0.005)


def _write(options: argparse.Namespace, placement: Placement, loads: LoadTable, cluster: Mapping[str, Any]) -> None:
    source = {"loads": loads.origin, "domain_weights": _weights(options.domain_weights)} | dict(cluster)
    source |= {"policy": options.policy, "from": None if options.old is None else str(options.old)}
    if options.format == "json":
        _draw(options.output, lambda path: save_placement(placement, path, source), "--output", "wrote")
    else:
        if loads.has_shared_expert:
            raise ConfigError(
                f"--format {options.format}: has no place for the shared expert, which the plan places as one more; "
                "give json, or plan the routed experts alone (--preset prefill, or no --shared-expert)"
            )
        if options.output.suffix != ".json":
            raise ConfigError(f"--output {options.output}: {options.format} reads JSON; give a name that ends in .json")
        content = engine_form(placement, options.format, None if options.model is None else _model(options))
        _draw(options.output, lambda path: write_json(path, content), "--output", "wrote")


def _check_figure(path: Path | None) -> None:
    from lightning_dsv3.plots import plotting_problem

    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--figure {path}: the figure is a PNG; give a name that ends in .png")
    if problem := plotting_problem():
        raise ConfigError(f"--figure {path}: {problem}")


def _draw(path: Path, write: Any, option: str = "--figure", done: str = "drew") -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror or error})") from error
    print(f"dsv3: {done} {path}", file=sys.stderr)
