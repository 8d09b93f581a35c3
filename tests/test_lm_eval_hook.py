"""Plain ``lm_eval`` finds the model and the tasks, and is what it was otherwise; Python starts as ever."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Environment
from tiny_model import tiny_model

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.data import load_tokenizer, save_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.models import MODEL_MAPPING

SOURCE = ROOT / "src"
TASKS = SOURCE / "lightning_dsv3" / "evaluation" / "tasks"
LINE = b"import lightning_dsv3_lm_eval_hook; lightning_dsv3_lm_eval_hook.install()\n"

# A task of the user's own under a name of ours, with its data.
NAME = "dsv3_gsm8k"
YAML = f"""\
task: {NAME}
custom_dataset: !function own_data.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 7.0}}
"""
DATA = """\
import datasets

def load(**_):
    rows = [{"question": f"{n} + {n} =", "choices": [str(2 * n), str(n)], "answer": 0} for n in range(4)]
    return {"test": datasets.Dataset.from_list(rows)}
"""


@pytest.fixture(scope="module")
def environment(tree_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, installed as users have it."""
    environment = Environment(tmp_path_factory.mktemp("hooked") / "environment")
    environment.install(tree_wheel)
    environment.see_test_packages()
    return environment


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint and a task of the user's own."""
    folder = tmp_path_factory.mktemp("user")
    checkpoint, own = folder / "checkpoint", folder / "own"
    save_hf_checkpoint(tiny_model(vocab_size=512, max_position_embeddings=256), checkpoint)
    save_tokenizer(load_tokenizer(512), checkpoint / "tokenizer.json")
    own.mkdir()
    (own / "task.yaml").write_text(YAML)
    (own / "own_data.py").write_text(DATA)
    return SimpleNamespace(checkpoint=checkpoint, own=own, output=folder / "output")


def run(environment: Environment, *words: str | Path) -> str:
    result = environment.run(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def our_names() -> set[str]:
    from lm_eval.tasks import TaskManager

    return set(TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks)


# In an environment with the wheel


def test_the_line_that_python_runs_is_this_one(environment):
    assert (SOURCE / "lightning_dsv3_lm_eval_hook.pth").read_bytes() == LINE
    assert (environment.site_packages / "lightning_dsv3_lm_eval_hook.pth").read_bytes() == LINE


def test_lm_eval_runs_the_model_and_a_users_task_wins_over_ours(environment, user):
    script = shutil.which("lm_eval", path=str(Path(sys.executable).parent))
    words = f"--model dsv3 --model_args checkpoint={user.checkpoint} --tasks {NAME} --limit 3".split()
    words += ["--include_path", str(user.own), "--output_path", str(user.output), "--batch_size", "2"]
    result = environment.run(environment.python, script, *words)
    assert result.returncode == 0, result.stderr
    # The user's own task in place of ours, and no other name is there twice.
    assert result.stderr.count("overrides existing task") == 1
    output = result.stdout
    assert f"dsv3 ({{'checkpoint': '{user.checkpoint}'}})" in output
    (written,) = user.output.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "dsv3"
    assert results["config"]["dsv3_model_info"]["name"] == str(user.checkpoint)
    assert results["versions"][NAME] == 7.0
    assert results["n-samples"][NAME]["effective"] == 3


# Of lm-eval's tasks some folders do here: to read all takes seconds, as in the run above, and to print them too.
COMMANDS = """
import json, runpy, sys
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

every = TaskIndex._iter_yaml_files
SOME = {"arc", "gsm8k", "hellaswag"}
TaskIndex._iter_yaml_files = staticmethod(
    lambda root: (path for path in every(root) if root.parent.name != "lm_eval" or SOME & set(path.parts))
)
tasks = sys.argv[1]
for words in (["ls", "tasks"], ["validate", "--tasks", tasks]):
    sys.argv[1:] = words
    runpy.run_module("lm_eval", run_name="__main__")
homes = {name: str(entry.yaml_path or "") for name, entry in TaskManager().task_index.items()}
print(json.dumps({"homes": homes, "modules": sorted(sys.modules)}))
"""


def test_ls_and_validate_know_our_tasks_beside_lm_evals(environment):
    output = run(environment, environment.python, "-W", "ignore", "-c", COMMANDS, f"{NAME},hellaswag")
    ours = our_names()
    assert NAME in ours
    assert all(name.startswith("dsv3_") for name in ours)
    listed = {line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|")}
    assert listed >= {*ours, "hellaswag", "arc_easy", "gsm8k"}
    assert "All tasks found and valid" in output

    report = json.loads(output.splitlines()[-1])
    folder = environment.site_packages.resolve() / "lightning_dsv3" / "evaluation" / "tasks"
    for name, home in report["homes"].items():
        if home:  # tags have none
            assert Path(home).is_relative_to(folder) == (name in ours), (name, home)
    assert not {"torch", "lightning_dsv3"} & set(report["modules"])


REGISTRY = """
import json, sys
import lm_eval.models
from lm_eval.api.registry import model_registry
print(json.dumps([sorted(model_registry), "torch" in sys.modules, "lightning_dsv3" in sys.modules]))
"""


def test_one_model_more_is_registered_and_nothing_imported_for_it(environment):
    output = run(environment, environment.python, "-c", REGISTRY)
    assert json.loads(output) == [sorted([*MODEL_MAPPING, "dsv3"]), False, False]
    output = run(environment, "env", "LIGHTNING_DSV3_NO_HOOK=1", environment.python, "-c", REGISTRY)
    assert json.loads(output) == [sorted(MODEL_MAPPING), False, False]


# Without a module that Python does not load by itself.
START = "import sys; print([sorted(sys.modules), [type(finder).__name__ for finder in sys.meta_path]])"


def test_python_starts_with_one_small_module_more(environment):
    hooked, finders = ast.literal_eval(run(environment, environment.python, "-c", START))
    off = run(environment, "env", "LIGHTNING_DSV3_NO_HOOK=1", environment.python, "-c", START)
    assert "LMEvalHook" in finders
    assert "LMEvalHook" not in off
    line = environment.site_packages / "lightning_dsv3_lm_eval_hook.pth"
    line.unlink()
    try:
        without, _ = ast.literal_eval(run(environment, environment.python, "-c", START))
    finally:
        line.write_bytes(LINE)
    assert set(hooked) - set(without) == {"lightning_dsv3_lm_eval_hook"}


def test_the_entry_points_name_the_same(environment):
    program = """
import importlib, json
from importlib.metadata import entry_points
import lightning_dsv3_lm_eval_hook as hook
(model,) = entry_points(group="lm_eval.models", name="dsv3")
(tasks,) = entry_points(group="lm_eval.tasks", name="dsv3")
print(json.dumps([model.value, hook.MODEL, [hook.tasks_folder()], list(importlib.import_module(tasks.value).__path__)]))
"""
    model, hooked, folder, named = json.loads(run(environment, environment.python, "-c", program))
    assert model == hooked == "lightning_dsv3.evaluation.lm:DSV3LM"
    assert isinstance(pkgutil.resolve_name(model), type)
    assert folder == [str(Path(path).resolve()) for path in named]


def test_a_broken_package_breaks_neither_python_nor_lm_eval(environment):
    package = environment.site_packages / "lightning_dsv3"
    package.rename(environment.bin / "away")
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    try:
        result = environment.run(environment.python, "-c", REGISTRY)
        assert (result.returncode, result.stderr) == (0, "")
        assert "hf" in json.loads(result.stdout)[0]
    finally:
        shutil.rmtree(package)
        (environment.bin / "away").rename(package)
    module = environment.site_packages / "lightning_dsv3_lm_eval_hook.py"
    module.rename(environment.bin / "away")
    try:
        assert run(environment, environment.python, "-c", "print(1)") == "1\n"
    finally:
        (environment.bin / "away").rename(module)


# Other versions of lm-eval, written here

REGISTRY_CODE = """
class Registry(dict):
    def register(self, name, target):
        assert self.setdefault(name, target) == target
model_registry = Registry()
"""
INDEX_CODE = """
class TaskIndex:
    @staticmethod
    def build(paths, *, resolve_includes=True):
        return [str(path) for path in paths], resolve_includes
"""
LOOK = """
import json, sys
import lightning_dsv3_lm_eval_hook as hook
hook.install()
hook.install()
assert sum(type(finder).__name__ == "LMEvalHook" for finder in sys.meta_path) == 1
from pathlib import Path
import lm_eval.models, lm_eval.tasks._index as index
from lm_eval.api.registry import model_registry
theirs, ours = Path(index.__file__).parent, hook.tasks_folder()
def build(*paths, **options):
    return index.TaskIndex.build(paths, **options) if hasattr(index, "TaskIndex") else None
print(json.dumps({
    "models": model_registry,
    "theirs": str(theirs),
    "ours": ours,
    "defaults": build(theirs, "user"),
    "options": build(theirs, resolve_includes=False),
    "no defaults": build("user"),
    "twice": build(theirs, ours, "user"),
    "source": index.__loader__.get_source(index.__name__),
}))
"""


def other_lm_eval(folder: Path, models: str, registry: str = REGISTRY_CODE, index: str = INDEX_CODE) -> dict:
    """Run with an lm-eval of these three modules."""
    modules = {"models/__init__": models, "api/registry": registry, "tasks/_index": index}
    for name, code in {"__init__": "", "api/__init__": "", "tasks/__init__": "", **modules}.items():
        path = folder / "lm_eval" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    environ = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{SOURCE}"}
    result = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=environ, check=True)
    assert result.stderr == ""
    return json.loads(result.stdout)


OWN = "from lm_eval.api.registry import model_registry\nmodel_registry.register('hf', 'theirs')\n"


def test_our_folder_stands_behind_lm_evals_and_before_the_users(tmp_path):
    found = other_lm_eval(tmp_path, OWN)
    assert found["ours"] == str(TASKS.resolve())
    assert found["models"] == {"hf": "theirs", "dsv3": "lightning_dsv3.evaluation.lm:DSV3LM"}
    assert found["defaults"] == [[found["theirs"], found["ours"], "user"], True]
    assert found["options"] == [[found["theirs"], found["ours"]], False]
    # Who wants no defaults wants none of ours.
    assert found["no defaults"] == [["user"], True]
    assert found["source"] == INDEX_CODE


def test_an_lm_eval_that_reads_entry_points_is_left_to_do_so(tmp_path):
    found = other_lm_eval(tmp_path, OWN + "model_registry.register('dsv3', 'by an entry point')\n")
    assert found["models"]["dsv3"] == "by an entry point"
    assert found["twice"] == [[found["theirs"], found["ours"], "user"], True]


def test_an_lm_eval_that_is_not_as_expected_works_as_without_us(tmp_path):
    found = other_lm_eval(tmp_path, "", registry="model_registry = {'hf': 'theirs'}", index="")
    assert (found["models"], found["defaults"]) == ({"hf": "theirs"}, None)


def test_an_error_of_lm_evals_own_is_seen(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as raised:
        other_lm_eval(tmp_path, "raise RuntimeError('their own')")
    assert "their own" in raised.value.stderr
