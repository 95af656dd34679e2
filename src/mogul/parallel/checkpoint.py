"""Checkpoints of sharded training that any number of ranks can read.

Written by torch's distributed checkpoint: each rank its own parts, each tensor under its name in
the model, so 1, 2 or 4 ranks read what 4, 2 or 1 wrote, with other meshes too. The folder appears
whole or not at all. Reading unpickles: only for folders you wrote yourself. `whole_state` gathers a
model for `save_pretrained`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mogul.core.errors import ArtifactError


def save_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write weights, optimizer state and `extra` (picklable, rank 0's counts); all ranks call.

    The format holds pickles: whoever reads the folder runs what its writer put there.
    """
    target = Path(folder)
    work = target.with_name(target.name + ".part")
    if dist.get_rank() == 0 and work.exists():
        shutil.rmtree(work)
    dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    values = {"model": weights, "optimizer": state, "extra": extra or {}}
    save(values, checkpoint_id=str(work))
    dist.barrier()
    if dist.get_rank() == 0:
        _replace(target, work)
    dist.barrier()


def _replace(target: Path, work: Path) -> None:
    """Give `work` the name; what had it is deleted after that, and gets it back on an error."""
    old = _old_of(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old_of(target: Path) -> Path:
    """Where the checkpoint before stands while the new one gets its name."""
    return target.with_name(target.name + ".old")


def load_sharded(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Read what `save_sharded` wrote into a sharded model and its optimizer; returns `extra`.

    Only for folders you wrote yourself: torch's reader unpickles the metadata and `extra`, so a
    folder made by another can run any code.

    Raises:
        ArtifactError: no such checkpoint.
    """
    if not (Path(folder) / ".metadata").exists():
        old = _old_of(Path(folder))
        raise ArtifactError(
            f"{folder} is no sharded checkpoint (it has no .metadata)",
            fix=f"rename {old}, left by a save that was cut off, to {folder}"
            if old.exists()
            else "give a folder that save_sharded wrote to its end",
        )
    weights, state = get_state_dict(model, optimizer)
    extra = _names_of_extra(folder)
    values = {"model": weights, "optimizer": state, "extra": extra}
    load(values, checkpoint_id=str(folder))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=values["model"],
        optim_state_dict=values["optimizer"],
    )
    return values["extra"]


def _names_of_extra(folder: str | Path) -> dict[str, Any]:
    """The keys of `extra` in a checkpoint: dcp fills only keys that it is asked for."""
    names = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    prefix = "extra."
    return {name[len(prefix) :]: None for name in names if name.startswith(prefix)}


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Every parameter whole, on the CPU of rank 0 (empty elsewhere); all ranks call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)
