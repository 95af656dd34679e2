"""A trace: what the experts of a model did over some data, as one small, mergeable record.

Decides what a trace holds, how two are added, and how the folder is laid out: `trace.json` names
one safetensors file with every array, by size and hash, so a run that is killed leaves its last
whole state. Integers add exactly. Per-token Parquet files may stand beside it (`observe`).

Arrays (L layers with experts, E experts, K picks, G = len(batch_sizes), S sampled tokens):
count [L,E] rows; weight_sum, weight_sqsum, score_sum [L,E]; coactivation [L,E,E] tokens that
pick both (the diagonal is count); transition [L-1,E,E] picks i in one layer and j in the next;
entropy_sum [L] nats; task_count [tasks,L,E]; distinct_hist [G,L,E+1] batches by distinct experts;
busiest_hist [G,L,64] batches by rows of the busiest expert; sample_ids [S,L,K] picks of an even
random sample of tokens with sample_key [S] and sample_task [S]. Level `activations` adds
norm_sum, norm_sqsum, weighted_norm_sum, weighted_norm_sqsum, max_activation [L,E],
output_sum [L,E,D], input_absmax and input_sqsum [L,D].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_write, read_json
from mogul.spec.base import Spec
from mogul.spec.grouping import Grouping

SCHEMA_VERSION = 1
META_FILE = "trace.json"
NUM_BUSIEST_BINS = 64

SUMMED = (
    "count", "weight_sum", "weight_sqsum", "score_sum", "coactivation", "transition",
    "entropy_sum", "distinct_hist", "busiest_hist", "norm_sum", "norm_sqsum",
    "weighted_norm_sum", "weighted_norm_sqsum", "output_sum", "input_sqsum",
)  # fmt: skip
MAXED = ("max_activation", "input_absmax")
SAMPLED = ("sample_key", "sample_ids", "sample_task")
_AGAIN = "make the trace again with `mogul trace`"


class ModelStamp(Spec):
    """Which model something was measured on."""

    name: str
    """Folder or name as the user gave it; not compared."""

    family: str
    num_layers: int = Field(ge=1)
    """Decoder layers, dense ones included."""

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    num_groups: int = Field(default=1, ge=1)
    """Groups of a MoGE (balance by construction)."""

    limit_num_groups: int = Field(default=1, ge=1)
    """Groups of group-limited routing (DeepSeek): a permutation must keep them whole."""

    hidden_size: int = Field(ge=1)
    expert_bytes: int = Field(default=0, ge=0)
    """Bytes of one expert of one layer; 0 where unknown."""

    weights_hash: str = ""
    """Fingerprint of the weight files; empty for a model that lives in memory only."""

    @model_validator(mode="after")
    def _picks_can_be(self) -> Self:
        _ = self.grouping  # refuses what cannot be
        return self

    @property
    def grouping(self) -> Grouping:
        """The grouping of the routed experts."""
        return Grouping(num_experts=self.num_experts, num_groups=self.num_groups, top_k=self.top_k)

    def check_same(self, other: ModelStamp, *, what: str) -> None:
        """Raise ConfigError where `other` is another model; names go uncompared."""
        for key in ModelStamp.model_fields:
            mine, theirs = getattr(self, key), getattr(other, key)
            known = key not in ("weights_hash", "expert_bytes") or (mine and theirs)
            if key != "name" and known and mine != theirs:
                raise ConfigError(
                    f"{what} was made with another model: {key} is {theirs} there ({other.name}) "
                    f"and {mine} here ({self.name})",
                    fix="make it again with this model",
                )


class TraceMeta(Spec):
    """Everything about a trace but its arrays."""

    schema_version: Literal[1] = 1
    model: ModelStamp
    layers: tuple[int, ...]
    """Indices of the layers with experts, in the order of the arrays."""

    level: Literal["routing", "activations"] = "routing"
    num_tokens: int = Field(ge=0)
    batch_sizes: tuple[int, ...] = ()
    """Tokens of the batches that the histograms count."""

    sample_limit: int = Field(default=0, ge=0)
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    """Names of the data, with the start of their hashes."""

    seed: int = 0
    is_complete: bool = True
    """False while the run goes on, and after it was killed."""

    versions: dict[str, str] = Field(default_factory=dict)
    stats_file: str = ""
    stats_bytes: int = 0
    stats_sha256: str = ""

    @model_validator(mode="after")
    def _layers_stand_in_order(self) -> Self:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                f"layers={self.layers} of a trace must be ascending and not empty",
                fix=_AGAIN,
            )
        return self


@dataclass(frozen=True)
class Trace:
    """A trace in memory."""

    meta: TraceMeta
    arrays: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        experts, layers = self.meta.model.num_experts, len(self.meta.layers)
        if (shape := self.get("count").shape) != (layers, experts):
            raise ArtifactError(
                f"the trace counts {shape}, not {layers} layers x {experts} experts",
                fix=_AGAIN,
            )
        for name in SUMMED:
            if not np.isfinite(self.arrays.get(name, 0)).all():
                raise ArtifactError(
                    f"{name!r} of the trace is not finite",
                    fix=_AGAIN,
                )

    @property
    def count(self) -> np.ndarray:
        """Rows of every expert, int64 [L, E]."""
        return self.arrays["count"]

    def get(self, name: str) -> np.ndarray:
        """One array, or ArtifactError saying how to record it."""
        if name not in self.arrays:
            raise ArtifactError(
                f"the trace holds no {name!r} (level {self.meta.level!r})",
                fix=_AGAIN + (" --level activations" if self.meta.level == "routing" else ""),
            )
        return self.arrays[name]

    def save(self, folder: str | Path) -> None:
        """Write the folder; a reader sees the state before or after, never a part."""
        from safetensors.numpy import save

        target = Path(folder)
        old = read_json(target / META_FILE).get("stats_file") if _is_trace(target) else None
        arrays = {name: np.ascontiguousarray(_narrow(a)) for name, a in self.arrays.items()}
        data = save(arrays)
        digest = hashlib.sha256(data).hexdigest()
        name = f"stats-{digest[:12]}.safetensors"
        atomic_write(target / name, data)
        meta = self.meta.replace(stats_file=name, stats_bytes=len(data), stats_sha256=digest)
        atomic_write(target / META_FILE, meta.model_dump_json(indent=2) + "\n")
        if old and old != name and Path(old).name == old:
            (target / old).unlink(missing_ok=True)


def _is_trace(folder: Path) -> bool:
    return (folder / META_FILE).is_file()


def _narrow(array: np.ndarray) -> np.ndarray:
    """The narrowest unsigned type that holds an integer array exactly (disk only)."""
    if array.dtype.kind not in "iu" or array.size == 0 or array.min() < 0:
        return array
    kinds = (np.uint8, np.uint16, np.uint32, np.uint64)
    return array.astype(next(kind for kind in kinds if array.max() <= np.iinfo(kind).max))


def load_trace(folder: str | Path) -> Trace:
    """Read a trace folder.

    Raises:
        ArtifactError: no trace, another schema, or a truncated or changed file, by name.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(folder)
    if not _is_trace(path):
        inner = path / "trace"  # of a training run
        fix = f"give {inner}" if _is_trace(inner) else "make one with `mogul trace`"
        raise ArtifactError(f"{path} holds no trace ({META_FILE} is missing)", fix=fix)
    meta = read_meta(path)
    stats = path / meta.stats_file
    try:
        data = stats.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {stats}: {error.strerror}", fix="trace again") from error
    if len(data) != meta.stats_bytes or hashlib.sha256(data).hexdigest() != meta.stats_sha256:
        raise ArtifactError(
            f"{stats} is damaged: {len(data)} bytes where {meta.stats_bytes} were written"
            if len(data) != meta.stats_bytes
            else f"{stats} was changed after it was written",
            fix="copy the folder again, or trace again",
        )
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ArtifactError(
            f"{stats} is not a safetensors file: {error}",
            fix=_AGAIN,
        ) from error
    keep = {"sample_key": np.uint64}
    wide = {
        name: a.astype(keep.get(name, np.int64)) if a.dtype.kind in "iu" else a
        for name, a in arrays.items()
    }
    return Trace(meta, wide)


def read_meta(folder: str | Path) -> TraceMeta:
    """Read `trace.json` alone."""
    file = Path(folder) / META_FILE
    values = read_json(file)
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        given = values.get("schema_version") if isinstance(values, dict) else None
        raise ArtifactError(
            f"{file} has schema version {given!r}; this mogul reads {SCHEMA_VERSION}",
            fix="trace again with this version",
        )
    return TraceMeta.parse(values, where=str(file))


def merge(first: Trace, second: Trace) -> Trace:
    """Add two traces of one model: integers exactly, sums in float64.

    Raises:
        ConfigError: They are of different models, levels or batch sizes.
    """
    a, b = first.meta, second.meta
    a.model.check_same(b.model, what="the second trace")
    for key in ("layers", "level", "batch_sizes"):
        if getattr(a, key) != getattr(b, key):
            raise ConfigError(
                f"the traces cannot be merged: {key} is {getattr(a, key)} in one and "
                f"{getattr(b, key)} in the other",
                fix="record both with the same options",
            )
    arrays = {n: first.arrays[n] + second.arrays[n] for n in SUMMED if _both(first, second, n)}
    for name in MAXED:
        if _both(first, second, name):
            arrays[name] = np.maximum(first.arrays[name], second.arrays[name])
    tasks, remaps = _merge_tasks(a.tasks, b.tasks)
    arrays["task_count"] = _merge_task_counts(first, second, len(tasks), remaps)
    limit = max(a.sample_limit, b.sample_limit)
    arrays |= _merge_samples(first, second, limit, remaps)
    meta = a.replace(
        num_tokens=a.num_tokens + b.num_tokens,
        tasks=tasks,
        data=(*a.data, *b.data),
        sample_limit=limit,
        is_complete=a.is_complete and b.is_complete,
    )
    return Trace(meta, arrays)


def _both(first: Trace, second: Trace, name: str) -> bool:
    return name in first.arrays and name in second.arrays


def _merge_tasks(
    a: tuple[str, ...], b: tuple[str, ...]
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    tasks = (*a, *(name for name in b if name not in a))
    return tasks, [np.array([tasks.index(n) for n in own], dtype=np.int64) for own in (a, b)]


def _merge_task_counts(
    first: Trace, second: Trace, num_tasks: int, remaps: list[np.ndarray]
) -> np.ndarray:
    total = np.zeros((num_tasks, *first.count.shape), dtype=np.int64)
    for trace, remap in zip((first, second), remaps, strict=True):
        total[remap] += trace.arrays["task_count"]
    return total


def _merge_samples(
    first: Trace, second: Trace, limit: int, remaps: list[np.ndarray]
) -> dict[str, np.ndarray]:
    parts = []
    for trace, remap in zip((first, second), remaps, strict=True):
        part = {name: trace.arrays[name] for name in SAMPLED}
        if len(remap):
            part["sample_task"] = remap[part["sample_task"]]
        parts.append(part)
    both = {name: np.concatenate([part[name] for part in parts]) for name in SAMPLED}
    order = np.argsort(both["sample_key"], kind="stable")[:limit]
    return {name: array[order] for name, array in both.items()}
