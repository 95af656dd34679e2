"""The trained model as a folder in Transformers' layout: config, safetensors, tokenizer, card.

With `with_code` the config carries `auto_map` and two small files that import mogul, for command
lines that load a folder with `trust_remote_code` and never import mogul themselves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mogul.core.errors import ConfigError
from mogul.core.files import atomic_folder, read_json
from mogul.models.load import bar_on_terminals_only
from mogul.models.new_checkpoint import COPIED_FILES

CODE_CONFIG = "configuration_mogul.py"
CODE_MODEL = "modeling_mogul.py"
_OUR_MODULES = "mogul.models"


def export(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: str | Path | None = None,
    with_code: bool = False,
    force: bool = True,
) -> Path:
    """Write the model; the folder appears whole or not at all.

    Raises:
        ConfigError: `with_code` for a model that is not mogul's own: it needs none.
        ArtifactError: The disk is full or cannot be written.
    """
    with atomic_folder(folder, force=force) as work:
        with bar_on_terminals_only():
            model.save_pretrained(work)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), work)
        if with_code:
            add_code(model, work)
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether `copy_tokenizer` finds one there."""
    names = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model")
    return any(file for name in names for file in folder.glob(name))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what Transformers' tokenizers read."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def add_code(model: PreTrainedModel, folder: Path) -> None:
    """Write `auto_map` and the files it names."""
    name, config = type(model).__name__, type(model.config).__name__
    if not type(model).__module__.startswith(_OUR_MODULES):
        raise ConfigError(
            f"{name} is a model of Transformers itself and needs no code",
            fix="export without --with-code",
        )
    about = (
        '"""Loads the classes of the installed package mogul (pip install mogul[models])."""\n\n'
    )
    (folder / CODE_CONFIG).write_text(f"{about}from mogul.models import {config}  # noqa: F401\n")
    (folder / CODE_MODEL).write_text(f"{about}from mogul.models import {name}  # noqa: F401\n")
    file = folder / "config.json"
    values: dict[str, Any] = read_json(file)
    values["auto_map"] = {
        "AutoConfig": f"{Path(CODE_CONFIG).stem}.{config}",
        "AutoModelForCausalLM": f"{Path(CODE_MODEL).stem}.{name}",
    }
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
