"""Read a recipe: a TOML file, at most one `extends` a file, then `--set section.key=value`.

A key given later wins; tables are merged key by key. Relative paths in a recipe are taken as they
stand, so a run starts where its files are. The resolved recipe is written beside the results.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_write, read_json
from mogul.train.recipe import Recipe

RECIPE_FILE = "recipe.json"
CARRIED = Path(__file__).parent / "recipes"
"""Recipes that mogul brings: `tiny` names one where no file has that name."""
MAX_EXTENDS = 8


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe (or a carried one, by name) with its bases, apply changes, check it all.

    Raises:
        ConfigError: An unknown key or a value that cannot be, by name.
        ArtifactError: A file is missing or no TOML.
    """
    file, carried = Path(path), CARRIED / f"{path}.toml"
    is_carried = carried.parent == CARRIED and carried.is_file() and not file.is_file()
    values = _with_bases(carried if is_carried else file, ())
    for change in changes:
        _set(values, change)
    return Recipe.parse(values, where=str(path))


def _with_bases(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror}", fix=_which_recipe()) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} is no TOML: {error}", fix="mend the line it names") from None
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{file}: extends={base!r} is no path", fix="name one recipe file")
    chain = (*seen, file.resolve())
    parent = file.parent / base
    if parent.resolve() in chain or len(chain) > MAX_EXTENDS:
        raise ConfigError(f"{file} extends itself through {base}", fix="break the circle")
    return merged(_with_bases(parent, chain), values)


def _which_recipe() -> str:
    names = ", ".join(sorted(file.stem for file in CARRIED.glob("*.toml")))
    return f"give the path of a TOML file, or a recipe that mogul brings: {names}"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, table by table."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


def _set(values: dict[str, Any], change: str) -> None:
    """Apply one `a.b=value`; the value is TOML, or a string as it stands."""
    key, sign, text = change.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {change!r} is no change", fix="write --set section.key=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = None if text in ("none", "None", "null") else text
    *tables, last = key.strip().split(".")
    place = values
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {key}: {table!r} is no table", fix="check the key")
    place[last] = value


def write_resolved(recipe: Recipe, folder: Path) -> None:
    """Write the whole recipe, the versions and the command line beside the results."""
    atomic_write(
        folder / RECIPE_FILE,
        json.dumps(
            {
                "recipe": recipe.model_dump(mode="json"),
                "versions": _versions(),
                "command": sys.argv,
            },
            indent=2,
        )
        + "\n",
    )


def read_resolved(folder: Path) -> Recipe:
    """The recipe that a run folder was made with."""
    content = read_json(folder / RECIPE_FILE)
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise ArtifactError(f"{folder / RECIPE_FILE} holds no recipe", fix="start a new run")
    return Recipe.parse(content["recipe"], where=str(folder / RECIPE_FILE))


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("mogul", "torch", "transformers", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
