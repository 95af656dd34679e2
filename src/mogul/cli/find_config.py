"""Find the config a command means: a folder, a file, `preset:NAME` or a hub id. No weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError
from mogul.core.files import read_json
from mogul.core.log import say
from mogul.spec import presets

PRESET = "preset:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class FoundConfig:
    """A config and where it came from."""

    name: str
    config: Mapping[str, Any]
    source: str
    folder: Path | None = None
    """The checkpoint's folder, where there is one on this machine."""


def find_config(model: str) -> FoundConfig:
    """Find the config of `model`; ArtifactError says what was looked for."""
    if model.startswith(PRESET):
        name = model.removeprefix(PRESET)
        return FoundConfig(name, presets.config(name), presets.source(name))
    path = Path(model).expanduser()
    if path.is_dir():
        return FoundConfig(path.resolve().name, _read(path / "config.json"), str(path), path)
    if path.is_file():
        return FoundConfig(path.name, _read(path), str(path))
    if _HUB_ID.fullmatch(model):
        return _from_hub(model)
    raise ArtifactError(
        f"{model!r} is no folder, file, preset or hub id",
        fix="give a checkpoint folder, a config.json, preset:NAME (`mogul info preset:` lists "
        "them) or owner/name",
    )


def _read(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds no JSON object", fix="give a model's config.json")
    return config


def _from_hub(hub_id: str) -> FoundConfig:
    """Take `config.json` from the hub's local cache, else download that one small file."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise ArtifactError(
            f"{hub_id!r} is not on this disk, and huggingface_hub is not installed",
            fix="pip install huggingface_hub, or give a folder or a preset",
        ) from error
    try:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if not isinstance(cached, str):
            say(f"fetching config.json of {hub_id} from the hub")
            cached = hf_hub_download(hub_id, "config.json", etag_timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # the hub's client raises many kinds, all of them mean no config
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"{hub_id!r} is not on this disk, and the hub did not give its config: {reason}",
            fix="check the name and the network, or give a folder or a preset",
        ) from error
    return FoundConfig(hub_id, _read(Path(cached)), f"hub: {hub_id}")
