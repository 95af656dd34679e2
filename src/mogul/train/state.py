"""What the next step of a training depends on: taken as a snapshot, and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mogul.core.errors import ArtifactError
from mogul.train.checkpoint import Snapshot, random_state, restore_random_state, to_host

if TYPE_CHECKING:
    from mogul.train.session import Session


def take(session: Session) -> Snapshot:
    """Weights, optimizer, data, random generators, guard and balance, copied to the host."""
    guard_numbers, waiting = session.guard.state()
    weights, tied = _without_ties(session.model.state_dict())
    return Snapshot(
        step=session.step,
        tensors={
            "model": to_host(weights),
            "optimizer": to_host(dict(session.optimizer.tensors(session.names))),
            "more": to_host({**random_state(session.device), **waiting}),
        },
        state={
            "tokens": session.tokens,
            "updates": session.optimizer.num_updates,
            "tied": tied,
            "data": session.stream.state(),
            "guard": guard_numbers,
            "balance": session.balancer.state() if session.balancer else None,
        },
    )


def put(session: Session, snapshot: Snapshot) -> None:
    """Make the session what it was.

    Raises:
        ArtifactError: The snapshot is of another model.
        ConfigError: It was made with other data.
    """
    state, tensors = snapshot.state, snapshot.tensors
    weights = dict(tensors["model"])
    weights |= {name: weights[kept] for name, kept in state["tied"].items()}
    try:
        session.model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"the checkpoint of step {snapshot.step} is of another model: {error}",
            fix="resume with the recipe the checkpoint was made with",
        ) from error
    session.optimizer.restore(session.names, tensors["optimizer"], int(state["updates"]))
    session.stream.restore(state["data"])
    session.guard.restore(state["guard"], tensors["more"])
    if session.balancer is not None and state["balance"]:
        session.balancer.restore(state["balance"])
    session.step, session.tokens = snapshot.step, int(state["tokens"])
    restore_random_state(tensors["more"], session.device)


def _without_ties(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name without second names, and second name -> first."""
    first: dict[tuple[int, torch.Size], str] = {}
    tied = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
    return {name: weights[name] for name in weights if name not in tied}, tied
