"""Checkpoints of a training: whole or absent, written beside the run, read without a pickle.

One folder a step: tensors in safetensors files, everything else in `state.json`, which also names
every file with its size and checksum. A folder appears by one rename after its files are on disk,
so a process that is killed leaves the last whole one; older ones go only after a newer is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mogul.core.errors import ArtifactError, MogulError
from mogul.core.files import atomic_folder, check_space, read_json
from mogul.core.log import say

STATE_FILE = "state.json"
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Snapshot:
    """A training at the end of one step, in the memory of the host."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name without suffix -> tensors."""
    state: Mapping[str, Any]
    """For JSON."""


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that nothing else writes to."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / f"step-{step:08d}"


def steps_in(root: Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    if not root.is_dir():
        return []
    found = [_NAME.fullmatch(one.name) for one in root.iterdir() if one.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def write(root: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write one checkpoint, then drop all but the newest `keep` up to it; later ones stay.

    Raises:
        ArtifactError: The disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = folder_of(root, snapshot.step)
    needed = sum(
        t.numel() * t.element_size() for file in snapshot.tensors.values() for t in file.values()
    )
    check_space(target, needed + (1 << 20))
    try:
        with atomic_folder(target, force=True) as work:
            files = {}
            for name, tensors in snapshot.tensors.items():
                save_file(dict(tensors), work / f"{name}.safetensors")
                files[f"{name}.safetensors"] = _flushed(work / f"{name}.safetensors")
            content = {"version": SCHEMA_VERSION, "step": snapshot.step, "files": files}
            state = work / STATE_FILE
            state.write_text(json.dumps({**content, **snapshot.state}, indent=1) + "\n")
            _flushed(state)
    except SafetensorError as error:
        raise ArtifactError(
            f"cannot write {target}: {error}; earlier checkpoints are kept",
            fix="free some space or choose another place",
        ) from error
    for step in [one for one in steps_in(root) if one <= snapshot.step][:-keep]:
        _remove(folder_of(root, step))
    return target


def _seal_of(file: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": file.stat().st_size, "crc32": checksum}


def _flushed(file: Path) -> dict[str, int]:
    """The seal of a file that is on disk now."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
    return _seal_of(file)


def _remove(folder: Path) -> None:
    """Rename first: a folder that is half gone must not look like a checkpoint."""
    going = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def read(folder: Path) -> Snapshot:
    """Read one checkpoint, checking size and checksum of every file it names.

    Raises:
        ArtifactError: A file is missing, damaged or of another version, by name.
    """
    state = read_json(folder / STATE_FILE)
    if not isinstance(state, dict) or state.get("version") != SCHEMA_VERSION:
        raise ArtifactError(f"{folder} is no checkpoint of this version", fix="use another one")
    files, step = state.get("files"), state.get("step")
    if not isinstance(files, dict) or not isinstance(step, int):
        raise ArtifactError(
            f"{folder / STATE_FILE} is damaged: it names no files or no step",
            fix="resume from an earlier one",
        )
    tensors = {}
    for name, seal in files.items():
        file = folder / name
        if file.name != name or file.suffix != ".safetensors":
            raise ArtifactError(
                f"{folder / STATE_FILE} names a strange file: {name!r}",
                fix="go on from an earlier checkpoint",
            )
        if not file.is_file() or _seal_of(file) != seal:
            raise ArtifactError(f"{file} is missing or damaged", fix="resume from an earlier one")
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise ArtifactError(
                f"{file} is no safetensors file: {error}", fix="go on from an earlier checkpoint"
            ) from error
    return Snapshot(step, tensors, state)


def read_newest(root: Path) -> Snapshot | None:
    """The newest whole checkpoint; damaged ones after it are told of and renamed aside.

    None leaves all as they are: nothing is there, or nothing is whole.
    """
    damaged = []
    for step in reversed(steps_in(root)):
        try:
            found = read(folder_of(root, step))
        except ArtifactError as error:
            say(f"checkpoint of step {step} is passed over: {error}")
            damaged.append(folder_of(root, step))
            continue
        for folder in damaged:
            _set_aside(folder)
        return found
    return None


def _set_aside(folder: Path) -> None:
    """Give a damaged checkpoint a name that is no checkpoint's; nothing is deleted."""
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        aside, number = folder.with_name(f"{folder.name}.damaged-{number}"), number + 1
    try:
        folder.rename(aside)
        say(f"{folder} is damaged: renamed to {aside.name}")
    except OSError as error:
        say(f"{folder} is damaged and cannot be renamed: {error.strerror}")


class Saver:
    """Writes checkpoints, in a thread of its own where asked; at most one at a time."""

    def __init__(self, root: Path, *, keep: int, asynchronous: bool) -> None:
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        self.last_step = -1
        self._thread: threading.Thread | None = None
        self._error: MogulError | None = None
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Half-written folders of a process that was killed."""
        if self.root.is_dir():
            for one in self.root.glob(".step-*"):
                shutil.rmtree(one, ignore_errors=True)

    def save(self, snapshot: Snapshot) -> None:
        """Start writing; raises what went wrong with the one before."""
        self.wait()
        self.last_step = snapshot.step
        if not self.asynchronous:
            write(self.root, snapshot, self.keep)
            return
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(self.root, snapshot, self.keep)
        except MogulError as error:
            self._error = error
        except OSError as error:
            self._error = ArtifactError(f"cannot write a checkpoint: {error}")

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the random generators that a training draws from."""
    found = {"rng_cpu": torch.get_rng_state()}
    if device.type != "cpu":
        found["rng_device"] = torch.get_device_module(device).get_rng_state(device)
    return found


def restore_random_state(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators where they were."""
    torch.set_rng_state(tensors["rng_cpu"])
    if device.type != "cpu" and "rng_device" in tensors:
        torch.get_device_module(device).set_rng_state(tensors["rng_device"], device)
