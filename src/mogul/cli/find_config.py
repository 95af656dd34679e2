"""Find the config a command means: a folder, file, `preset:NAME`, carried model or hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError
from mogul.core.files import read_object
from mogul.core.log import say
from mogul.spec import presets
from mogul.spec.carried import carried_folder

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
        return FoundConfig(path.resolve().name, read_object(path / "config.json"), str(path), path)
    if path.is_file():
        return FoundConfig(path.name, read_object(path), str(path))
    if (carried := carried_folder(model)) is not None:
        return FoundConfig(model, read_object(carried / "config.json"), "carried by mogul", carried)
    if _HUB_ID.fullmatch(model):
        return _from_hub(model)
    close = get_close_matches(model, presets.names(), n=1)
    raise ArtifactError(
        f"{model!r} is no folder, file, preset or hub id",
        fix=f"did you mean '{PRESET}{close[0]}'?"
        if close
        else "give a checkpoint folder, a config.json, preset:NAME (`mogul info preset:` lists "
        "them) or owner/name",
    )


def _from_hub(hub_id: str) -> FoundConfig:
    """Take `config.json` from the hub's local cache, else download that one small file."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError as error:
        raise ArtifactError(
            f"{hub_id!r} is not on this disk, and huggingface_hub is not installed",
            fix="pip install huggingface_hub, or give a folder or a preset",
        ) from error
    source = f"hub: {hub_id}"
    try:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if isinstance(cached, str):
            return FoundConfig(hub_id, read_object(Path(cached)), source)
        return FoundConfig(hub_id, _download(hub_id), source)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{hub_id!r} is not on this disk, and the hub did not give its config: {error}",
            fix="check the name and the network, or give a folder or a preset",
        ) from error


def _download(hub_id: str) -> dict[str, Any]:
    """Fetch one config by one plain request: quick to fail where there is no network."""
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    say(f"fetching config.json of {hub_id} from the hub")
    request = Request(hf_hub_url(hub_id, "config.json"), headers=build_hf_headers())
    with urlopen(request, timeout=_HUB_TIMEOUT_S) as answer:
        config = json.loads(answer.read())
    if not isinstance(config, dict):
        raise ValueError("its config.json is no JSON object")
    return config
