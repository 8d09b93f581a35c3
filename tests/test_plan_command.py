"""``dsv3 plan``: tables, files and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from published_placement import imbalance, tables

from lightning_dsv3.cli import dsv3
from lightning_dsv3.inference.placement import plan_placement
from lightning_dsv3.inference.placement_files import load_placement

CLUSTER = ["--gpus", "8", "--slots", "40"]


@pytest.fixture
def loads(tmp_path):
    """A load file of two domains: layers 1 and 2 and an MTP layer of 32 experts, 4 of them for a token."""
    counts = {
        domain: (1000 * tables("spiky", 3, 32, seed)).astype(int).tolist() for seed, domain in enumerate(("en", "code"))
    }
    content = {
        "format": 1, "layers": ["layer_1", "layer_2", "mtp_1"], "domains": list(counts), "counts": counts,
        "tokens": {domain: sum(rows[0]) // 4 for domain, rows in counts.items()},
    }  # fmt: skip
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(content))
    return path


def run(capsys, *words):
    code = dsv3.main(["plan", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(output):
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}


def mixture(loads, *domains):
    counts = json.loads(loads.read_text())["counts"]
    return np.sum([counts[domain] for domain in domains or counts], axis=0).astype(float)


def test_the_table_has_what_the_plan_does(loads, tmp_path, capsys):
    code, output, errors = run(capsys, loads, *CLUSTER, "--output", tmp_path / "plan.json")
    assert code == 0
    assert errors == f"dsv3: wrote {tmp_path / 'plan.json'}\n"
    rows = rows_of(output)
    assert rows["layer"] == ["before", "published", "balanced", "bound", "replicas"]
    plan = load_placement(tmp_path / "plan.json")
    assert plan.layers == ("layer_1", "layer_2", "mtp_1")
    load = mixture(loads)
    for number, layer in enumerate(plan.layers):
        before, published, balanced, bound, replicas = map(float, rows[layer])
        assert before == pytest.approx(imbalance(load[number], list(range(32)), 8), abs=1e-4)
        assert balanced == pytest.approx(
            imbalance(load[number], plan.physical_to_logical[number].tolist(), 8), abs=1e-4
        )
        assert before > published >= balanced >= bound >= 1
        assert replicas == plan.replica_counts[number].max()
    assert float(rows["worst"][2]) == max(float(rows[layer][2]) for layer in plan.layers)
    assert "32 experts in 40 slots, 5 on each of 8 GPUs" in output
    source = json.loads((tmp_path / "plan.json").read_text())["source"]
    assert source["loads"] == str(loads)
    assert source["policy"] == "balanced"


def test_weights_choose_the_traffic(loads, tmp_path, capsys):
    run(capsys, loads, *CLUSTER, "--domain-weights", "code=1", "--output", tmp_path / "plan.safetensors")
    plan = load_placement(tmp_path / "plan.safetensors")
    code = mixture(loads, "code")
    expected = plan_placement(code, num_slots=40, num_gpus=8)
    assert plan.physical_to_logical.tolist() == expected.physical_to_logical.tolist()
    assert plan.imbalance(code).mean() < plan.imbalance(mixture(loads, "en")).mean()


def test_a_plan_is_changed_in_steps(loads, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    run(capsys, loads, *CLUSTER, "--domain-weights", "en=1", "--output", old)
    words = [
        loads,
        *CLUSTER,
        "--domain-weights",
        "en=0.8,code=0.2",
        "--from",
        old,
        "--model",
        "tiny",
        "--dtype",
        "bf16",
    ]
    code, output, _ = run(capsys, *words, "--output", new)
    assert code == 0
    found = re.search(r"experts to load: (\d+) \((\S+) MB\); with a plan from scratch: (\d+)", output)
    moves = sum(
        len(set(after) - set(before))
        for was, now in zip(load_placement(old).experts_by_gpu, load_placement(new).experts_by_gpu, strict=True)
        for before, after in zip(was.tolist(), now.tolist(), strict=True)
    )
    assert moves == int(found[1]) < int(found[3])
    assert float(found[2]) == pytest.approx(moves * 3 * 192 * 96 * 2 / 1e6, rel=1e-3)
    _, output, _ = run(capsys, *words, "--max-moves", "2")
    assert "experts to load: 2 " in output or "experts to load: 1 " in output


def test_the_reports_deployments(loads, tmp_path, capsys):
    code, output, _ = run(capsys, loads, "--preset", "prefill")
    assert code == 0
    assert "32 experts in 288 slots, 9 on each of 32 GPUs" in output
    code, output, _ = run(capsys, loads, "--preset", "decode", "--output", tmp_path / "plan.json")
    assert code == 0
    assert "33 experts in 320 slots, 1 on each of 320 GPUs" in output  # the shared expert is one of them
    plan = load_placement(tmp_path / "plan.json")
    # A token uses four experts: the shared one, used by every token, has a quarter of what all others have.
    counts = plan.replica_counts[:, 32].double()
    assert ((counts / 320 - 0.2).abs() < 0.02).all()


@pytest.mark.parametrize("form", ["sglang", "vllm", "vllm-ascend"])
def test_engines_forms_are_written(loads, tmp_path, capsys, form):
    path = tmp_path / "engine.json"
    code, _, _ = run(capsys, loads, *CLUSTER, "--format", form, "--output", path)
    assert code == 0
    content = json.loads(path.read_text())
    if form == "vllm-ascend":
        assert content["moe_layer_count"] == 2
    else:
        assert np.array(content["physical_to_logical_map"]).shape == (3 if form == "sglang" else 2, 40)


def test_twins_that_cannot_be_avoided_are_said(tmp_path, capsys):
    path = tmp_path / "loads.csv"
    path.write_text("5,1,1\n")
    _, _, errors = run(capsys, path, "--gpus", "2", "--slots", "8")
    assert "2 replicas share a GPU" in errors
    assert "with 4 slots on a GPU and 3 experts it cannot be avoided" in errors


def test_twins_of_a_published_policy_and_their_advantage_are_said(tmp_path, capsys):
    path = tmp_path / "loads.csv"
    path.write_text("1,0.9,0.1\n")
    _, _, errors = run(capsys, path, "--gpus", "2", "--slots", "4", "--policy", "global")
    assert "1 replicas share a GPU with another of their expert: policy global does not avoid it" in errors
    _, _, errors = run(capsys, path, "--gpus", "2", "--slots", "4")
    assert "in 1 layers the published plan is more even" in errors


def test_a_drift_is_replayed(loads, tmp_path, capsys):
    path = tmp_path / "drift.json"
    words = ["simulate", loads, *CLUSTER, "--steps", "13", "--interval", "3", "--model", "tiny", "--output", path]
    code, output, _ = run(capsys, *words)
    assert code == 0
    content = json.loads(path.read_text())
    assert set(content["imbalance"]) == {"unplanned", "planned once", "re-planned fully", "re-planned in steps"}
    lines = [line for line in output.splitlines() if re.match(r" +\d+  ", line)]
    assert len(lines) == 13
    last = lines[-1].split()
    assert last[:3] == ["12", "code", "100%"]
    expected = [values[-1] for values in content["imbalance"].values()] + [content["bound"][-1]]
    assert [float(value) for value in last[3:]] == pytest.approx(expected, abs=1e-4)
    assert "en 50%, code 50%" in output
    moved = {name: sum(values) for name, values in content["moved"].items()}
    assert re.search(rf"re-planned in steps +{moved['re-planned in steps']} \(", output)


def test_figures_are_drawn(loads, tmp_path, capsys):
    for words in ([loads], ["simulate", loads, "--steps", "5", "--interval", "2"]):
        path = tmp_path / "figures" / "figure.png"
        code, _, errors = run(capsys, *words, *CLUSTER, "--figure", path)
        assert code == 0
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"drew {path}" in errors
        path.unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots", "40"], "--gpus: missing; give it, or a deployment by --preset decode | prefill"),
        (["--gpus", "8", "--slots", "24"], "num_slots=24 is fewer than the 32 experts"),
        (["--gpus", "8", "--slots", "41"], "num_slots=41 is not a multiple"),
        ([*CLUSTER, "--domain-weights", "fr=1"], "has no domain 'fr'"),
        ([*CLUSTER, "--domain-weights", "en"], "--domain-weights: 'en' is not of the form english=0.5"),
        ([*CLUSTER, "--preset", "prefil"], "did you mean 'prefill'?"),
        ([*CLUSTER, "--format", "sglang"], "--format sglang: give --output"),
        ([*CLUSTER, "--figure", "a.pdf"], "--figure a.pdf: the figure is a PNG"),
        ([*CLUSTER, "--output", "plan.txt"], "plan.txt: a plan is a .json or a .safetensors file"),
        ([*CLUSTER, "--from", "absent.json"], "absent.json: the plan cannot be read"),
        ([*CLUSTER, "--model", "671b"], "--model 671b: it has 256 routed experts, and the loads have 32"),
        (["--preset", "decode", "--format", "vllm", "--output", "a.json"], "no place for the shared expert"),
        ([*CLUSTER, "--shared-expert", "--experts-per-token", "-1"], "--experts-per-token -1: must be 1 or more"),
        (
            ["--gpus", "8", "--slots", "48", "--nodes", "4", "--groups", "3", "--keep-groups"],
            "3 groups cannot be shared",
        ),
    ],
)
def test_a_mistake_is_one_line(loads, capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, loads, *words)
    assert code == 2
    assert errors.startswith("dsv3: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [("1,nan\n", "load[0, 1] = nan is not a finite number"), ("1,-1\n", "load[0, 1] = -1.0 is negative"),
     ("1,2\n1\n", "layers have different numbers of experts (2 in row_1; 1 in row_2)")],
)  # fmt: skip
def test_a_bad_table_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "loads.csv"
    path.write_text(content)
    code, _, errors = run(capsys, path, "--gpus", "1", "--slots", "2")
    assert (code, errors.count("\n")) == (2, 1)
    assert message in errors


def test_plans_of_another_deployment_and_simulations_of_one_domain_are_refused(loads, tmp_path, capsys):
    old = tmp_path / "old.json"
    run(capsys, loads, *CLUSTER, "--output", old)
    _, _, errors = run(capsys, loads, "--gpus", "8", "--slots", "48", "--from", old)
    assert "the plan has 40 slots, not 48" in errors
    _, _, errors = run(capsys, loads, *CLUSTER, "--from", old, "--policy", "global")
    assert "leave --policy global out" in errors
    path = tmp_path / "loads.csv"
    path.write_text("1,2\n")
    _, _, errors = run(capsys, "simulate", path, "--gpus", "1", "--slots", "2")
    assert "at least two domains" in errors
    _, _, errors = run(capsys, "simulate", loads, *CLUSTER, "--domains", "en,cod")
    assert "--domains: no domain 'cod'" in errors
    assert "did you mean 'code'?" in errors
    _, _, errors = run(capsys, path, "--gpus", "1", "--slots", "3", "--shared-expert")
    assert "--experts-per-token: needed" in errors


def test_help_teaches_and_the_light_commands_stay_light(capsys):
    for words in (["--help"], ["simulate", "--help"]):
        with pytest.raises(SystemExit) as caught:
            dsv3.main(["plan", *words])
        assert caught.value.code == 0
        assert "examples:" in capsys.readouterr().out
    program = "import sys; from lightning_dsv3.cli import dsv3; dsv3.main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "plan      redundant experts" in result.stdout
