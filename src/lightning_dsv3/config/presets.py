"""Where presets live: YAML files of the package ``lightning_dsv3.configs``, one folder per group."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from lightning_dsv3.config.errors import ConfigError, did_you_mean

GROUPS = ("model", "train", "data", "study")


def preset_names(group: str) -> list[str]:
    """Return the names of a group's presets.

    >>> "671b" in preset_names("model")
    True
    """
    folder = _folder(group)
    if not folder.is_dir():
        return []
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(group: str, name: str) -> dict[str, Any]:
    """Return the values of ``configs/<group>/<name>.yaml``, or of a YAML file when ``name`` is a path to one.

    Args:
        group: model, train, data or study.
        name: Preset name, or a path that ends in .yaml or .yml.

    Raises:
        ConfigError: No such preset or file, or a file that is not a YAML mapping.
    """
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name), key=group)
    known = preset_names(group)
    if name not in known:
        raise ConfigError(
            f"{group}={name!r}: no such preset; {did_you_mean(name, known)}; or give a path to a .yaml file"
        )
    return _mapping(_folder(group).joinpath(f"{name}.yaml").read_text(encoding="utf-8"), f"{group}={name}")


def read_yaml(path: Path, key: str) -> dict[str, Any]:
    """Return the mapping in a YAML file that the user named under ``key``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={str(path)!r}: the file cannot be read ({error}); check the path") from error
    return _mapping(text, f"{key}={str(path)!r}")


def _folder(group: str) -> Traversable:
    return resources.files("lightning_dsv3.configs").joinpath(group)


def _mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: must hold `key: value` lines, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}
