"""Load tables read, plans written: our own forms and the engines'."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from published_placement import tables
from safetensors.torch import load_file

from lightning_dsv3.balance.loads import expert_loads, save_loads
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference.load_tables import read_load_table
from lightning_dsv3.inference.placement import PlacementError, placement_of, plan_placement
from lightning_dsv3.inference.placement_files import engine_form, load_placement, save_placement

LOADS = {
    "format": 1, "layers": ["layer_1", "mtp_1"], "domains": ["en", "zh"],
    "counts": {"en": [[3, 1, 0], [2, 2, 0]], "zh": [[0, 1, 3], [1, 1, 2]]}, "tokens": {"en": 2, "zh": 2},
}  # fmt: skip


@pytest.fixture
def plan():
    import dataclasses

    placement = plan_placement(tables("zipf", 3, 8, 0), num_slots=12, num_gpus=4, num_nodes=2)
    return dataclasses.replace(placement, layers=("layer_1", "layer_3", "mtp_1"))


def write(tmp_path, content, name="loads.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_the_monitor_writes_is_read(tmp_path):
    counts = {"en": [torch.tensor([6, 2]), torch.tensor([4, 4])], "zh": [torch.tensor([1, 3]), torch.tensor([0, 4])]}
    save_loads(expert_loads(["layer_1", "layer_2"], counts, [2, 2]), tmp_path / "loads.json")
    for path in (tmp_path / "loads.json", tmp_path):
        table = read_load_table(path)
        assert table.layers == ("layer_1", "layer_2")
        assert table.experts_per_token == 2
        assert table.mixture().tolist() == [[7, 5], [4, 8]]
        assert table.mixture({"zh": 2}).tolist() == [[0.25, 0.75], [0, 1]]


def test_the_shared_expert_gets_every_token(tmp_path):
    table = read_load_table(write(tmp_path, LOADS)).with_shared_expert(2)
    assert table.mixture()[0].tolist() == [3, 2, 3, 4]
    assert table.has_shared_expert


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1,2,3\n4,5,6\n", ("row_1", "row_2")),
        ("e0,e1,e2\n1,2,3\n4,5,6\n", ("row_1", "row_2")),
        ("layer,0,1,2\n\nlayer_3,1,2,3\nlayer_4, 4 ,5,6\n", ("layer_3", "layer_4")),
        (",0,1,2\n0,1,2,3\n1,4,5,6\n", ("0", "1")),
        ("layer,e0,e1,e2\nlayer_3,1,2,3\nlayer_4,4,5,6e0\n", ("layer_3", "layer_4")),
    ],
    ids=["bare", "header", "numbered header and names", "index", "header and names"],
)
def test_csv(tmp_path, text, layers):
    table = read_load_table(write(tmp_path, text, "loads.csv"))
    assert table.layers == layers
    assert table.mixture().tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "loads.json", "neither JSON"),
        ([1], "loads.json", "not a load file"),
        (LOADS | {"format": 2}, "loads.json", "format 2; this version reads format 1"),
        (LOADS | {"layers": []}, "loads.json", "has no layers"),
        (LOADS | {"counts": {"en": LOADS["counts"]["en"]}}, "loads.json", "counts of domain 'zh' must have one row"),
        (LOADS | {"domains": ["en"], "counts": {"en": [[1, 2], [1, 2, 3]]}}, "loads.json",
         r"different numbers of experts \(2 in layer_1; 3 in mtp_1\)"),
        (LOADS | {"counts": {"en": [[1, 2]] * 2, "zh": [[1, 2, 3]] * 2}}, "loads.json", "domains have different numb"),
        (LOADS | {"domains": ["en"], "counts": {"en": [[1, -1, 2], [1, 1, 1]]}}, "loads.json",
         r"domain 'en': load\[0, 1\] = -1.0 is negative"),
        ("1,2\n3,nan\n", "loads.csv", r"load\[1, 1\] = nan"),
        ("1,2\n3,x\n", "loads.csv", "layer row_2, expert 1: 'x' is not a number"),
        ("a,1,2\nb,3\n", "loads.csv", "2 in a; 1 in b"),
        ("", "loads.csv", "shape"),
    ],
)  # fmt: skip
def test_a_load_table_that_cannot_be_used_is_one_error(tmp_path, content, name, message):
    with pytest.raises(PlacementError, match=message) as caught:
        read_load_table(write(tmp_path, content, name))
    assert name in str(caught.value)


def test_a_missing_load_table_is_one_error(tmp_path):
    with pytest.raises(PlacementError, match=r"nothing.json: the load table cannot be read \(No such file"):
        read_load_table(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"fr": 1}, "no domain 'fr'"),
        ({"en": -1}, "en=-1 must be 0 or more"),
        ({"en": 0.0}, "one of them must be above 0"),
    ],
)
def test_domain_weights_are_checked(tmp_path, weights, message):
    with pytest.raises(PlacementError, match=message):
        read_load_table(write(tmp_path, LOADS)).mixture(weights)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_plan_comes_back_as_it_was(tmp_path, plan, name):
    path = tmp_path / "new" / name
    save_placement(plan, path, {"loads": "loads.json"})
    read = load_placement(path)
    for field in ("physical_to_logical", "logical_to_physical", "replica_counts"):
        assert torch.equal(getattr(read, field), getattr(plan, field))
    assert (read.num_gpus, read.num_nodes, read.keeps_groups, read.layers) == (4, 2, False, plan.layers)
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    if name.endswith("json"):
        content = json.loads(path.read_text())
        assert content["format"] == 1
        assert content["source"] == {"loads": "loads.json"}
    else:
        stored = load_file(path)
        assert {key: str(value.dtype) for key, value in stored.items()} == dict.fromkeys(
            ("physical_to_logical", "logical_to_physical", "replica_counts"), "torch.int64"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9"),
        ({"num_gpus": 5}, "slots a multiple of num_gpus"),
        ({"physical_to_logical": [[0] * 12] * 3}, "layer 0 must hold each of 8 experts"),
        ({"replica_counts": None}, "not a plan of dsv3 plan"),
    ],
)
def test_a_broken_plan_is_one_error(tmp_path, plan, change, message):
    path = tmp_path / "plan.json"
    save_placement(plan, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlacementError, match=message):
        load_placement(path)
    for name in ("absent.json", "absent.safetensors"):
        with pytest.raises(PlacementError, match="cannot be read"):
            load_placement(tmp_path / name)
    with pytest.raises(PlacementError, match=r"json or a \.safetensors"):
        save_placement(plan, tmp_path / "plan.pt")


def test_sglang_gets_a_row_for_every_layer_of_the_model(plan):
    rows = engine_form(plan, "sglang")["physical_to_logical_map"]
    assert rows[1] == plan.physical_to_logical[0].tolist()
    assert rows[3] == plan.physical_to_logical[1].tolist()
    assert rows[0] == rows[2] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert len(rows) == 4
    model = DeepSeekV3Config.from_preset("tiny", n_routed_experts=8, n_group=1, topk_group=1, num_hidden_layers=6)
    assert len(engine_form(plan, "sglang", model)["physical_to_logical_map"]) == 6


def test_sglang_numbers_unnamed_rows_by_the_model():
    unnamed = plan_placement(tables("zipf", 3, 8, 0), num_slots=12, num_gpus=4)
    with pytest.raises(PlacementError, match="needs each layer's number"):
        engine_form(unnamed, "sglang")
    model = DeepSeekV3Config.from_preset("tiny", n_routed_experts=8, n_group=1, topk_group=1)
    rows = engine_form(unnamed, "sglang", model)["physical_to_logical_map"]
    assert rows[1:] == unnamed.physical_to_logical.tolist()
    with pytest.raises(PlacementError, match="8 experts and the model 32"):
        engine_form(unnamed, "sglang", DeepSeekV3Config.from_preset("tiny"))


def test_vllm_gets_its_three_arrays(plan):
    form = engine_form(plan, "vllm")
    physical = np.array(form["physical_to_logical_map"])
    logical, counts = np.array(form["logical_to_physical_map"]), np.array(form["logical_replica_count"])
    assert physical.shape == (2, 12)
    assert logical.shape == (2, 8, 5)  # four redundant experts and one
    for layer, expert in np.ndindex(2, 8):
        slots = logical[layer, expert, : counts[layer, expert]]
        assert (physical[layer, slots] == expert).all()
        assert (logical[layer, expert, counts[layer, expert] :] == -1).all()


def test_vllm_ascend_gets_the_experts_of_each_device(plan):
    form = engine_form(plan, "vllm-ascend")
    assert form["moe_layer_count"] == len(form["layer_list"]) == 2
    for number, layer in enumerate(form["layer_list"]):
        assert (layer["layer_id"], layer["device_count"]) == (number, 4)
        assert [device["device_id"] for device in layer["device_list"]] == [0, 1, 2, 3]
        experts = [device["device_expert"] for device in layer["device_list"]]
        assert experts == plan.experts_by_gpu[number].tolist()
    twins = placement_of(np.array([[0, 0, 1, 2]]), 3, 2)
    with pytest.raises(PlacementError, match="1 replicas share a device"):
        engine_form(twins, "vllm-ascend")
    with pytest.raises(PlacementError, match="no such form"):
        engine_form(plan, "trt")
