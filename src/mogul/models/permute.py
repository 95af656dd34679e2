"""Renumber the experts of a checkpoint by a placement: the same function, new positions.

Works on bytes, so every stored dtype passes, quantised ones too: an expert with tensors of its own
gets other names, and a tensor whose first axis counts experts (router rows, biases, scales, fused
experts) gets its blocks in another order. One tensor is in memory at a time. Groups of a MoGE and
of group-limited routing must stay whole, or the router would pick other experts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_folder, check_space, read_json
from mogul.core.log import progress
from mogul.spec.checkpoint import INDEX, Checkpoint, TensorEntry, read_checkpoint
from mogul.spec.families import Family, family_of
from mogul.spec.fingerprint import stamp_of_folder
from mogul.spec.placement import Placement
from mogul.spec.trace import ModelStamp


@dataclass(frozen=True)
class Renumbering:
    """What happens to the experts of a checkpoint."""

    family: Family
    orders: Mapping[int, np.ndarray]
    """Layer -> old expert at every new position [E]."""
    num_groups: int = 1
    renames: tuple[tuple[str, str], ...] = ()
    """Parts of tensor names and what takes their place."""

    def row_order(self, layer: int, num_rows: int) -> np.ndarray:
        """Old row at every new position of a tensor with a row an expert, then null experts.

        Null experts belong to the groups in equal parts, so they move with their group.
        """
        order_E = self.orders[layer]
        size, nulls = len(order_E) // self.num_groups, num_rows - len(order_E)
        group_M = order_E.reshape(self.num_groups, size)[:, 0] // size
        null_MN = group_M[:, None] * (nulls // self.num_groups) + np.arange(
            nulls // self.num_groups
        )
        return np.concatenate([order_E, len(order_E) + null_MN.ravel()])


def orders_of(placement: Placement) -> dict[int, np.ndarray]:
    """The new order of the experts in every layer.

    Raises:
        ConfigError: Replicas or empty slots (a checkpoint has each expert once), or an order that
            would tear a group apart.
    """
    if placement.has_replicas or placement.has_empty_slots:
        raise ConfigError(
            "a checkpoint holds every expert exactly once; this placement has replicas or empty "
            "slots",
            fix="place without replicas on a number of devices that divides the experts, or give "
            "the placement to the serving engine (--export)",
        )
    orders = {one.layer: np.array(one.expert_of_slot) for one in placement.layers}
    for layer, order_E in orders.items():
        check_order(order_E, placement.model, layer)
    return orders


def check_order(order_E: np.ndarray, model: ModelStamp, layer: int) -> None:
    """Raise ConfigError unless every group of the model stays whole."""
    groups = max(model.num_groups, model.limit_num_groups)
    if groups == 1:
        return
    group_MJ = (order_E // (model.num_experts // groups)).reshape(groups, -1)
    if (group_MJ != group_MJ[:, :1]).any():
        raise ConfigError(
            f"layer {layer}: this order tears the {groups} groups of experts apart, and the "
            "router would pick other experts",
            fix="place whole groups (without --allow-imbalance), or give the placement to the "
            "serving engine (--export)",
        )


def permute_checkpoint(
    source: str | Path, out: str | Path, placement: Placement, *, force: bool = False
) -> None:
    """Write a copy of a checkpoint folder with its experts in the placement's order.

    Raises:
        ConfigError: The placement was made for another model, or cannot be a permutation.
        ArtifactError: A damaged checkpoint, or no room on the disk.
    """
    folder = Path(source)
    stamp_of_folder(folder).check_same(placement.model, what="the placement")
    orders = orders_of(placement)
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise ArtifactError(f"{folder} has no safetensors files", fix="check the path")
    family = family_of(read_json(folder / "config.json"))
    change = Renumbering(family, orders, placement.model.num_groups)
    check_space(Path(out), checkpoint.num_bytes)
    with atomic_folder(out, force=force) as work:
        write_reordered(checkpoint, work, change)


def write_reordered(checkpoint: Checkpoint, work: Path, change: Renumbering) -> None:
    """Write every file of a checkpoint, its experts in their new order, a tensor at a time."""
    _copy_others(checkpoint.folder, work, checkpoint)
    weight_map: dict[str, str] = {}
    with progress("writing shards", total=len(checkpoint.files)) as bar:
        for name in checkpoint.files:
            weight_map |= _write_shard(checkpoint, name, work / name, change)
            bar.advance(1, name)
    if (checkpoint.folder / INDEX).exists():
        index = {**read_json(checkpoint.folder / INDEX), "weight_map": weight_map}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_others(folder: Path, work: Path, checkpoint: Checkpoint) -> None:
    skip = {*checkpoint.files, INDEX}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in skip:
            shutil.copyfile(file, work / file.name)


def _write_shard(
    checkpoint: Checkpoint, name: str, target: Path, change: Renumbering
) -> dict[str, str]:
    """Write one shard; returns the file of every tensor by its new name."""
    entries = sorted(
        (t for t in checkpoint.tensors.values() if t.file == name), key=lambda t: t.first_byte
    )
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    new_names = [new_name(t.name, change) for t in entries]
    for entry, new in zip(entries, new_names, strict=True):
        head[new] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (checkpoint.folder / name).open("rb") as source, target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            source.seek(entry.first_byte)
            file.write(_reordered(source.read(entry.num_bytes), entry, change))
    return dict.fromkeys(new_names, name)


def new_name(tensor: str, change: Renumbering) -> str:
    """The name of a tensor after renumbering: only tensors of one expert change their number."""
    found = re.search(change.family.tensors.expert, tensor)
    order_E = change.orders.get(int(found["layer"])) if found else None
    if found and order_E is not None and "expert" in found.groupdict():
        position = int(np.flatnonzero(order_E == int(found["expert"]))[0])
        start, end = found.span("expert")
        tensor = f"{tensor[:start]}{position}{tensor[end:]}"
    for old, new in change.renames:
        tensor = tensor.replace(old, new)
    return tensor


def _reordered(data: bytes, entry: TensorEntry, change: Renumbering) -> bytes:
    """The bytes of a tensor, its blocks of experts reordered where an axis counts experts."""
    patterns = (change.family.tensors.expert, change.family.tensors.router)
    found = next((f for p in patterns if (f := re.search(p, entry.name))), None)
    if found is None or found.groupdict().get("expert") is not None:
        return data
    layer, shape = int(found["layer"]), entry.shape
    if layer not in change.orders:
        return data
    if shape[:1] == (1,) and len(shape) > 1:
        shape = shape[1:]  # Pangu Pro stores its scales as [1, E]
    experts = len(change.orders[layer])
    if not shape or shape[0] < experts:
        raise ArtifactError(
            f"{entry.name} has shape {list(entry.shape)}; its first axis should count the "
            f"{experts} experts",
            fix="apply the placement to the checkpoint that was traced",
        )
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(shape[0], -1)
    return blocks[change.row_order(layer, shape[0])].tobytes()
