"""Act 3, it trains: dense model, twin and MoGE on the same tokens.

The MoGE trains first, for the given seconds; the others then take the same number of steps on the
same batches. All parameters are trained. One model is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mogul.bench.demo.cast import NAMES, DemoSettings, Name, cast_member, free_memory
from mogul.bench.demo.cells import Cell, device_counts, measure
from mogul.observe.recorder import record_routing
from mogul.spec.balance import rows_per_expert
from mogul.spec.grouping import Grouping
from mogul.train.data import Windows, batches, shipped_text, token_windows
from mogul.train.evaluate import HeldOutLoss, held_out_loss
from mogul.train.loop import TrainRecord, train
from mogul.train.optimizer import TrainSettings

HONEST = (
    "This shows that the upcycled model trains: its loss falls and its copies part. It does not "
    "show that it is better than the twin or the dense model: so little training cannot."
)


@dataclass(frozen=True)
class Routing:
    """How the experts of a model are used on the held-out text."""

    smallest_share: float
    """Smallest share of an expert in the picks of its group, all layers; even use: 1/copies."""
    largest_share: float
    share_by_layer: list[list[float]]
    """Shares in their group, [layers][experts]."""


@dataclass(frozen=True)
class Learner:
    """One model's minute."""

    model: Name
    params: int
    before: HeldOutLoss
    after: HeldOutLoss
    training: TrainRecord
    routing_before: Routing | None
    routing_after: Routing | None
    copy_distance: float | None
    """Mean over pairs of copies of |a - b| / mean(|a|, |b|), after; before it is 0."""
    balance_after: tuple[Cell, ...]
    """Act 2's measure with the trained routers, positions of the held-out text as steps."""


@dataclass(frozen=True)
class LearningResult:
    """Act 3."""

    learners: tuple[Learner, ...]
    copies: int
    train_bytes: int
    held_out_bytes: int


def act_learning(checkpoint: Path, tokenizer: Any, settings: DemoSettings) -> LearningResult:
    """Train the three models one after the other on the same batches."""
    corpus = shipped_text()
    windows = token_windows(corpus.train, tokenizer, settings.window_tokens)
    held_out = token_windows(corpus.held_out, tokenizer, settings.window_tokens)
    held_out = held_out.spread(settings.held_out_windows)
    learners: list[Learner] = []
    steps: int | None = None
    for name in NAMES:
        learner = _learn(checkpoint, name, windows, held_out, settings, steps)
        free_memory()
        steps = learner.training.steps
        learners.append(learner)
    return LearningResult(
        learners=tuple(learners),
        copies=settings.grouping.group_size,
        train_bytes=sum(len(text.encode()) for text in corpus.train),
        held_out_bytes=int(held_out.bytes_per_token.sum()),
    )


def _learn(
    checkpoint: Path,
    name: Name,
    windows: Windows,
    held_out: Windows,
    settings: DemoSettings,
    steps: int | None,
) -> Learner:
    model = cast_member(checkpoint, name, settings)
    if name != "dense":
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = settings.balance_coef
    before, ids_before = _evaluate(model, name, held_out, f"act 3: {name}, held-out loss before")
    record = train(
        model,
        batches(windows, batch_size=settings.batch_windows, seed=settings.seed),
        TrainSettings(
            lr=settings.lr,
            warmup_steps=settings.warmup_steps,
            max_steps=steps or settings.max_steps,
            max_seconds=None if steps else settings.seconds,
        ),
        description=f"act 3: {name} trains",
    )
    free_memory()
    after, ids_after = _evaluate(model, name, held_out, f"act 3: {name}, held-out loss after")
    grouping = None if name == "dense" else settings.grouping_of(name)
    return Learner(
        model=name,
        params=sum(p.numel() for p in model.parameters()),
        before=before,
        after=after,
        training=record,
        routing_before=_routing(ids_before, grouping),
        routing_after=_routing(ids_after, grouping),
        copy_distance=copy_distance(model, grouping) if grouping else None,
        balance_after=_balance(name, ids_after, grouping, settings),
    )


def _evaluate(
    model: Any, name: Name, held_out: Windows, description: str
) -> tuple[HeldOutLoss, np.ndarray | None]:
    """Held-out loss and, in the same pass, the picks [layers, N, L, K]."""
    if name == "dense":
        return held_out_loss(model, held_out, description=description), None
    with record_routing(model) as recording:
        loss = held_out_loss(model, held_out, description=description)
        ids = recording.ids()
    return loss, ids.reshape(len(ids), len(held_out), held_out.length, -1)


def _routing(ids: np.ndarray | None, grouping: Grouping | None) -> Routing | None:
    if ids is None or grouping is None:
        return None
    shares = np.stack([share_in_group(layer, grouping) for layer in ids])
    return Routing(float(shares.min()), float(shares.max()), shares.tolist())


def share_in_group(ids: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Share of each expert in the picks of its group, [E]; each group sums to 1."""
    rows_MJ = rows_per_expert(ids, grouping.num_experts).reshape(grouping.num_groups, -1)
    return (rows_MJ / rows_MJ.sum(axis=1, keepdims=True)).ravel()


def _balance(
    name: Name, ids: np.ndarray | None, grouping: Grouping | None, settings: DemoSettings
) -> tuple[Cell, ...]:
    if ids is None or grouping is None:
        return ()
    steps = ids[:, :, -settings.decode_steps :]
    return tuple(
        measure(name, "trained", steps, batch, devices, grouping)
        for batch in settings.batch_sizes
        if batch <= ids.shape[1]
        for devices in device_counts(name, settings)
    )


@torch.no_grad()
def copy_distance(model: Any, grouping: Grouping) -> float:
    """Mean over pairs of experts in a group of |a - b| / mean(|a|, |b|), all layers; 0 = copies."""
    found = []
    for layer in model.model.layers:
        square, norm = 0.0, 0.0
        experts = layer.mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight_MJx = weight.detach().reshape(grouping.num_groups, grouping.group_size, -1)
            # Differences, not a Gram matrix: copies are so close that it would cancel.
            pairs = torch.combinations(torch.arange(grouping.group_size)).tolist()
            square += torch.stack(
                [(weight_MJx[:, a] - weight_MJx[:, b]).square().sum(-1) for a, b in pairs], dim=1
            )
            norm += weight_MJx.square().sum(-1)
        mean_norm_M1 = torch.as_tensor(norm).sqrt().mean(dim=1, keepdim=True)
        found.append(float((torch.as_tensor(square).sqrt() / mean_norm_M1).mean()))
    return float(np.mean(found))
