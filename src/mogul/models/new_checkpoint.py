"""A checkpoint folder made from another: where it may go, and which files come along."""

from __future__ import annotations

import shutil
from pathlib import Path

from mogul.core.errors import ConfigError
from mogul.core.log import say

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
