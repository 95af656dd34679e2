"""Shapes of published models that ship with mogul: one JSON file a model.

Every file holds `config` (a `config.json`), `source` (where its values were read) and
`published` (the counts its makers print, which tests compare). No weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mogul.core.errors import ConfigError, nearest

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Every preset's name, sorted."""
    return sorted(path.name.removesuffix(".json") for path in _FOLDER.glob("*.json"))


def config(name: str) -> dict[str, Any]:
    """Return a preset's `config.json`; ConfigError names the nearest preset."""
    return copy.deepcopy(_read(name)["config"])


def source(name: str) -> str:
    """Say where a preset's values were read."""
    return str(_read(name)["source"])


def published(name: str) -> Mapping[str, Any]:
    """Return the counts the model's makers print."""
    return dict(_read(name)["published"])


@cache
def _read(name: str) -> dict[str, Any]:
    if name not in names():
        raise ConfigError(f"there is no preset {name!r}", fix=nearest(name, names()))
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
