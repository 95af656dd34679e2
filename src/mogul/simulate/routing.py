"""Who computes what: rows and distinct experts of every rank, before a token is routed.

A popularity says how likely each expert is; the grouping says what is fixed. With D ranks that
hold whole groups, the rows of every rank are exact (T*K/D) and only the distinct experts vary.
Everything else is drawn: small batches pick by pick, large ones by the normal law. The result is
a LayerLoad per layer kind that can be looked at: rows, distinct, rho, delta, rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mogul.core.errors import ArtifactError, ConfigError
from mogul.spec.base import Spec
from mogul.spec.grouping import Grouping
from mogul.spec.placement import load_placement
from mogul.spec.trace import load_trace

DRAWS = 48
MAX_DRAWN = 200_000
"""Random numbers one load may cost before the normal law takes over."""


class Routing(Spec):
    """How tokens choose: uniform, by a power law, or as a trace says."""

    kind: Literal["uniform", "power_law", "trace"] = "uniform"
    alpha: float = Field(default=0.5, ge=0)
    """Power law: the r-th most popular expert of a group (or layer) is picked like r^-alpha."""

    file: str | None = None
    """Trace: a `trace/` folder, or a .npz with `load` [L, E] (rows every expert got)."""

    placement: str | None = None
    """A placement.json (replicas share their rows evenly); None means contiguous blocks."""

    spread: float = Field(default=1.0, ge=1)
    """Busiest rank over the mean that no drawing explains (a router's measured skew)."""


@dataclass(frozen=True)
class LayerLoad:
    """The work of every expert rank in one layer for one step."""

    rows_D: Float[np.ndarray, " D"]
    """Expected rows by rank."""

    distinct_D: Float[np.ndarray, " D"]
    """Expected distinct experts by rank."""

    max_rows: float
    """Expected rows of the busiest rank of a step."""

    max_distinct: float
    ranks_per_token: float
    """Expected ranks one token's picks are spread over."""

    is_exact: bool
    """Rows are the same on every rank, whatever the router says."""

    @property
    def rho(self) -> float:
        """Expected rows of the busiest rank over the mean."""
        mean = float(self.rows_D.mean())
        return self.max_rows / mean if mean else 1.0

    @property
    def delta(self) -> float:
        """Expected distinct experts of the fullest rank over the mean."""
        mean = float(self.distinct_D.mean())
        return self.max_distinct / mean if mean else 1.0


def layer_loads(
    routing: Routing,
    grouping: Grouping,
    num_tokens: int,
    num_ranks: int,
    num_layers: int,
    num_replicas: int = 0,
) -> list[tuple[int, LayerLoad]]:
    """Loads of a step of `num_tokens` tokens over `num_ranks` ranks, with how many layers each.

    Layers differ only where a trace or a placement says so.

    Raises:
        ConfigError: the trace or placement does not fit the model.
    """
    popularity = _popularity(routing, grouping, num_layers)
    if num_replicas and routing.placement is None:
        share = [_with_replicas(chance_E, num_ranks, num_replicas) for chance_E in popularity]
    else:
        share = _shares(routing, grouping.num_experts, num_ranks, num_layers)
    layers = 1 if len(popularity) == len(share) == 1 else num_layers
    loads = []
    for layer in range(layers):
        chance_E = popularity[layer % len(popularity)]
        share_ED = share[layer % len(share)]
        key = (chance_E.tobytes(), share_ED.tobytes())
        args = (grouping, max(1, num_tokens), num_ranks, key, routing.spread)
        load = _load(*args)  # pyright: ignore[reportArgumentType]  (frozen, hence hashable)
        loads.append((num_layers // layers, load))
    return loads


def _popularity(routing: Routing, grouping: Grouping, num_layers: int) -> list[np.ndarray]:
    """Chance of each expert to be one of a token's picks, by layer; sums to K."""
    groups, size, picks = grouping.num_groups, grouping.group_size, grouping.picks_per_group
    if routing.kind == "trace":
        load_LE = _trace_load(routing, grouping.num_experts, num_layers)
        return [_inclusion(row.reshape(groups, size), picks).ravel() for row in load_LE]
    alpha = routing.alpha if routing.kind == "power_law" else 0.0
    rng = np.random.default_rng(0)
    weight_J = np.arange(1, size + 1, dtype=float) ** -alpha
    weight_MJ = np.stack([rng.permutation(weight_J) for _ in range(groups)])
    return [_inclusion(weight_MJ, picks).ravel()]


def _inclusion(weight_MJ: np.ndarray, picks: int) -> np.ndarray:
    """Chances q = 1 - (1-p)^c to be among `picks` picks, with c so that each group sums to it."""
    p_MJ = np.maximum(weight_MJ, 1e-12)
    p_MJ = p_MJ / p_MJ.sum(axis=1, keepdims=True)
    if picks == 1:
        return p_MJ
    low, high = np.zeros((len(p_MJ), 1)), np.full((len(p_MJ), 1), 1e4)
    for _ in range(60):
        middle = (low + high) / 2
        too_many = (1 - (1 - p_MJ) ** middle).sum(axis=1, keepdims=True) > picks
        low, high = np.where(too_many, low, middle), np.where(too_many, middle, high)
    return 1 - (1 - p_MJ) ** ((low + high) / 2)


def _trace_load(routing: Routing, num_experts: int, num_layers: int) -> np.ndarray:
    if not routing.file:
        raise ConfigError("routing.kind='trace' needs routing.file", fix="give the trace's folder")
    path = Path(routing.file)
    if path.suffix == ".npz":
        try:
            load = np.atleast_2d(np.asarray(np.load(path)["load"], dtype=float))
        except (OSError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path} has no array 'load': {error}",
                fix="make the trace again with `mogul trace`",
            ) from None
    else:
        load = load_trace(path).count.astype(float)
    if load.shape[1] != num_experts or load.shape[0] not in (1, num_layers):
        raise ConfigError(
            f"{path} has loads of {load.shape[0]} layers x {load.shape[1]} experts, the model "
            f"{num_layers} x {num_experts}",
            fix="record the trace with this model",
        )
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ArtifactError(
            f"the loads in {path} must be finite and not negative",
            fix="make the trace again with `mogul trace`",
        )
    return load


def _shares(
    routing: Routing, num_experts: int, num_ranks: int, num_layers: int
) -> list[Float[np.ndarray, "E D"]]:
    """What part of an expert's rows each rank computes, by layer (one entry: all alike)."""
    if routing.placement is None:
        return [np.eye(num_ranks)[np.arange(num_experts) * num_ranks // num_experts]]
    placement = load_placement(routing.placement)
    if placement.num_devices != num_ranks or placement.model.num_experts != num_experts:
        raise ConfigError(
            f"{routing.placement} places {placement.model.num_experts} experts on "
            f"{placement.num_devices} devices; here are {num_experts} experts on {num_ranks} ranks",
            fix=f"use ep={placement.num_devices} and the model it was made for",
        )
    if len(placement.layers) not in (1, num_layers):
        raise ConfigError(
            f"{routing.placement} places {len(placement.layers)} layers, the model has "
            f"{num_layers}",
            fix="place the experts of a trace of this model",
        )
    shares = []
    for one in placement.layers:
        slots_DS = np.array(one.expert_of_slot).reshape(num_ranks, -1)
        copies_DE = np.stack(
            [np.bincount(row[row >= 0], minlength=num_experts) for row in slots_DS]
        )
        shares.append((copies_DE / copies_DE.sum(axis=0)).T)
    return shares


def _with_replicas(chance_E: np.ndarray, num_ranks: int, num_replicas: int) -> np.ndarray:
    """Copies to the largest share, then heaviest first to the emptiest rank with a free slot."""
    count_E = np.ones(len(chance_E), dtype=int)
    for _ in range(num_replicas):
        count_E[int(np.argmax(chance_E / count_E))] += 1
    slots = np.repeat(np.arange(len(chance_E)), count_E)
    weight = (chance_E / count_E)[slots]
    room = np.full(num_ranks, len(slots) // num_ranks)
    load_D, share_ED = np.zeros(num_ranks), np.zeros((len(chance_E), num_ranks))
    for slot in np.argsort(-weight, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, load_D, np.inf)))
        room[rank] -= 1
        load_D[rank] += weight[slot]
        share_ED[slots[slot], rank] += 1 / count_E[slots[slot]]
    return share_ED


@lru_cache(maxsize=4096)
def _load(
    grouping: Grouping, tokens: int, num_ranks: int, key: tuple[bytes, bytes], spread: float
) -> LayerLoad:
    chance_E = np.frombuffer(key[0])
    share_ED = np.frombuffer(key[1]).reshape(grouping.num_experts, num_ranks)
    rows_D = tokens * chance_E @ share_ED
    distinct_D = _touched(chance_E, share_ED, tokens).sum(axis=0)
    is_exact = _has_whole_groups(grouping, share_ED)
    max_rows, max_distinct = _drawn_max(grouping, tokens, chance_E, share_ED)
    if not is_exact:
        max_rows = max(max_rows, float(rows_D.max())) * spread
    return LayerLoad(
        rows_D,
        distinct_D,
        float(rows_D.max()) if is_exact else max_rows,
        max(max_distinct, float(distinct_D.max())),
        _ranks_per_token(grouping, chance_E, share_ED),
        is_exact,
    )


def _touched(chance_E: np.ndarray, share_ED: np.ndarray, tokens: int) -> np.ndarray:
    """Chance that a rank reads an expert at all in a step, [E, D]."""
    return 1 - (1 - np.minimum(chance_E[:, None] * share_ED, 1.0)) ** tokens


def _has_whole_groups(grouping: Grouping, share_ED: np.ndarray) -> bool:
    """Whether every group stands on one rank and all ranks have equally many groups."""
    share_MJD = share_ED.reshape(grouping.num_groups, grouping.group_size, -1)
    if share_ED.shape[1] > 1 and (share_MJD != share_MJD[:, :1]).any():
        return False
    groups_D = share_MJD[:, 0].sum(axis=0)
    return bool(np.isin(share_ED, (0.0, 1.0)).all() and (groups_D == groups_D[0]).all())


def _drawn_max(
    grouping: Grouping, tokens: int, chance_E: np.ndarray, share_ED: np.ndarray
) -> tuple[float, float]:
    """Expected maximum over ranks of rows and of distinct experts."""
    num_experts, num_ranks = share_ED.shape
    if num_ranks == 1:
        return float(chance_E.sum() * tokens), 0.0
    if tokens * num_experts * 8 <= MAX_DRAWN:
        draws = int(min(DRAWS, MAX_DRAWN // (tokens * num_experts)))
        return _picked_max(grouping, tokens, chance_E, share_ED, draws)
    mean_D = tokens * chance_E @ share_ED
    free = 1 - grouping.picks_per_group / grouping.group_size
    per_rank_D = share_ED.sum(axis=0) / num_experts
    variance_D = tokens * (chance_E * (1 - chance_E)) @ share_ED * np.maximum(1 - per_rank_D, 0)
    noise_SD = np.random.default_rng(0).standard_normal((256, num_ranks))
    rows_SD = mean_D + np.sqrt(variance_D if free else 0 * variance_D) * noise_SD
    distinct_D = _touched(chance_E, share_ED, tokens).sum(axis=0)
    return float(rows_SD.max(axis=1).mean()), float(distinct_D.max())


def _picked_max(
    grouping: Grouping, tokens: int, chance_E: np.ndarray, share_ED: np.ndarray, draws: int
) -> tuple[float, float]:
    groups, size, picks = grouping.num_groups, grouping.group_size, grouping.picks_per_group
    log_weight_MJ = np.log(np.maximum(chance_E.reshape(groups, size), 1e-12))
    # The picks of a token: the largest of log weight + Gumbel noise, without replacement.
    noise = np.random.default_rng(0).gumbel(size=(draws * tokens, groups, size))
    chosen = np.argpartition(log_weight_MJ + noise, size - picks, axis=-1)[..., size - picks :]
    expert = (chosen + np.arange(groups)[:, None] * size).reshape(draws, -1)
    key = expert + len(chance_E) * np.arange(draws)[:, None]
    count_SE = np.bincount(key.ravel(), minlength=draws * len(chance_E)).reshape(draws, -1)
    rows_SD = count_SE @ share_ED
    distinct_SD = (count_SE > 0) @ np.ceil(share_ED)
    return float(rows_SD.max(1).mean()), float(distinct_SD.max(1).mean())


def _ranks_per_token(grouping: Grouping, chance_E: np.ndarray, share_ED: np.ndarray) -> float:
    """Expected ranks that hold at least one pick of a token."""
    missed_D = np.ones(share_ED.shape[1])
    for group in range(grouping.num_groups):
        inside = slice(group * grouping.group_size, (group + 1) * grouping.group_size)
        missed_D *= _missed(grouping, chance_E[inside] @ share_ED[inside])
    return float((1 - missed_D).sum())


def _missed(grouping: Grouping, expected_D: np.ndarray) -> np.ndarray:
    """Chance that none of a group's picks falls on a rank that expects `expected_D` of them."""
    size, picks = grouping.group_size, grouping.picks_per_group
    local_D = np.minimum(expected_D / picks * size, size)
    missed_D = np.ones_like(expected_D)
    for pick in range(picks):
        missed_D *= np.clip((size - local_D - pick) / (size - pick), 0, 1)
    return missed_D
