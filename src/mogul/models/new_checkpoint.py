"""A checkpoint folder made from another: where it may go, what comes along, its weight files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from mogul.core.errors import ConfigError
from mogul.core.log import progress, say
from mogul.models.tensor_file import NewTensor, header_of, split_in_files
from mogul.spec.checkpoint import INDEX

COPIED_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files copied from the source as they are."""

WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "README.md", ".*")
"""Files made anew, whose absence needs no word."""


def check_out(source: Path, out: Path, force: bool) -> None:
    """Keep a forced replacement from destroying the source or anything but a checkpoint."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{out} holds the source {source}", fix="choose another --out")
    has_content = out.is_dir() and any(out.iterdir())
    if has_content and force and not (out / "config.json").exists():
        raise ConfigError(
            f"{out} is no checkpoint (it has no config.json), so --force does not replace it",
            fix="choose another --out",
        )
    if has_content and not force:
        raise ConfigError(f"{out} exists already", fix="choose another --out, or pass --force")


def copy_files(source: Path, work: Path) -> None:
    """Copy tokenizer, template, generation config and licence; name what stays behind."""
    left = []
    for path in sorted(source.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in COPIED_FILES):
            shutil.copyfile(path, work / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, work / path.name)
        elif not any(path.match(pattern) for pattern in WEIGHT_FILES):
            left.append(path.name)
    if left:
        say(f"not copied from {source}: {', '.join(left)}")


def write_weights(
    work: Path,
    entries: Sequence[NewTensor],
    write: Callable[[BinaryIO, NewTensor], None],
    *,
    title: str,
    num_params: int,
    max_file_bytes: int,
) -> None:
    """Write files from front to back, and their index where there are several.

    Args:
        work: folder of the new checkpoint.
        entries: its tensors.
        write: appends the bytes of one of them.
        title: of the progress shown.
        num_params: parameters of the model, for the index.
        max_file_bytes: largest file, unless one tensor is larger.
    """
    files = split_in_files(entries, max_file_bytes)
    total_bytes = sum(entry.num_bytes for entry in entries)
    with progress(title, total=total_bytes) as bar:
        for file_name, part in files.items():
            with (work / file_name).open("wb") as file:
                file.write(header_of(part))
                for entry in part:
                    write(file, entry)
                    bar.advance(entry.num_bytes, note=entry.name.removeprefix("model."))
    if len(files) > 1:
        index = {
            "metadata": {"total_parameters": num_params, "total_size": total_bytes},
            "weight_map": {entry.name: name for name, part in files.items() for entry in part},
        }
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
