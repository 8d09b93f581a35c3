"""Lets lm-eval find the ``dsv3`` model and the ``dsv3_*`` tasks without a flag.

lm-eval 0.4.13 has no plug-ins. Later versions read the entry points that the package declares; for those before, the
file ``lightning_dsv3_lm_eval_hook.pth``, one line, has Python call :func:`install` at its start. That must cost nothing
and break nothing, so this module stands beside the package and not in it (an import of the package at every start would
decide which of two checkouts a program sees), imports only what Python itself has loaded by then, and gives up in
silence wherever lm-eval is not as expected: what is lost then is the name ``dsv3``, which lm-eval says.

Two modules of lm-eval are touched, right after they have run:

- ``lm_eval.models``: the name is added to the registry, not the class, so that nothing is imported. Not sooner: lm-eval
  registers its own models only while the registry is empty.
- ``lm_eval.tasks._index``: where lm-eval's own tasks are looked up, so is our folder; behind theirs and before the
  user's. If it is there already, because lm-eval read the entry points, nothing is added.

``LIGHTNING_DSV3_NO_HOOK=1`` turns it off.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# The same words as in the entry point: lm-eval takes a second registration for the same one only then.
MODEL = "lightning_dsv3.evaluation.lm:DSV3LM"


def install() -> None:
    """Watch for lm-eval, unless that is not wanted, done already, or too late."""
    try:
        off = os.environ.get("LIGHTNING_DSV3_NO_HOOK", "") not in ("", "0")
        if not off and not any(type(finder).__name__ == "LMEvalHook" for finder in sys.meta_path):
            sys.meta_path.insert(0, LMEvalHook())
    except Exception:  # a start of Python that fails would be too high a price
        pass


class LMEvalHook:
    """A finder that finds nothing itself, and lets a function have each of two modules when it has run."""

    def __init__(self) -> None:
        self._waiting = {"lm_eval.models": add_model, "lm_eval.tasks._index": add_tasks}

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find as if this finder were not there."""
        # Taken out first: the finders below may come back here.
        change = self._waiting.pop(name, None)
        if change is None:
            return None
        try:
            for finder in sys.meta_path:
                spec = None if finder is self else finder.find_spec(name, path, target)
                if spec is not None:
                    _run_after(spec, change)
                    return spec
        except Exception:  # whoever is asked next meets the error, if it is one
            pass
        return None


def _run_after(spec: "Any", change: "Callable[[Any], None]") -> None:
    """Call ``change`` with a module that has run."""
    run = spec.loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        from contextlib import suppress

        run(module)
        # Some loaders have more than one module.
        if module.__name__ == spec.name:
            with suppress(Exception):  # another lm-eval than those known
                change(module)

    # On the loader that is there, which stays what it was to everybody who looks at it.
    spec.loader.exec_module = exec_module


def add_model(module: "Any") -> None:
    """Register the model's name, which is imported when it is asked for."""
    from lm_eval.api.registry import model_registry

    if "dsv3" not in model_registry:
        model_registry.register("dsv3", target=MODEL)


def add_tasks(module: "Any") -> None:
    """Look up our tasks where lm-eval's own are looked up."""
    build = module.TaskIndex.build
    theirs = os.path.realpath(os.path.dirname(module.__file__))

    def build_with_ours(paths: "Any", *args: "Any", **kwargs: "Any") -> "Any":
        return build(_with_ours(list(paths), theirs), *args, **kwargs)

    module.TaskIndex.build = staticmethod(build_with_ours)


def _with_ours(paths: "list[Any]", theirs: str) -> "list[Any]":
    try:
        folders = [os.path.realpath(path) for path in paths]
        ours = tasks_folder()
        if ours not in folders and theirs in folders:
            place = folders.index(theirs) + 1
            return [*paths[:place], type(paths[place - 1])(ours), *paths[place:]]
    except Exception:  # a package that cannot be found has no tasks
        pass
    return paths


def tasks_folder() -> str:
    """Return the folder with our tasks, without importing the package."""
    from importlib.util import find_spec

    spec = find_spec("lightning_dsv3")
    assert spec is not None
    assert spec.origin is not None
    return os.path.realpath(os.path.join(os.path.dirname(spec.origin), "evaluation", "tasks"))
