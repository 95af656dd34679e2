"""Training on an accelerator: compiled, in bf16, and resumed bit by bit."""

from __future__ import annotations

import pytest
import torch

from mogul.train import checkpoint, state
from mogul.train.session import CHECKPOINTS, Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.accelerator.is_available(), reason="needs an accelerator; none is here"
    ),
]

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "router_n_groups": 4,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 64,
}
ON_DEVICE = {
    "model__config": SHAPE,
    "run__device": "auto",
    "run__batch_size": 8,
    "run__sequence_length": 64,
    "run__steps": 20,
    "optimizer__lr": 0.003,
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("compile", [True, False])
def test_the_loss_falls_as_on_the_cpu(recipe, tmp_path, kind, compile):
    def losses(**changes):
        folder = tmp_path / changes["run__device"]
        with Session(recipe(**{**ON_DEVICE, "optimizer__kind": kind, **changes}), folder) as one:
            return [one.take_step()[0].loss for _ in range(20)]

    there = losses(run__device="auto", run__compile=compile)
    here = losses(run__device="cpu", run__compile=False)
    assert there[-1] < there[0] - 1
    # Other random weights, the same data: the curves lie close together.
    assert abs(there[-1] - here[-1]) < 0.6


def test_resumed_is_bit_identical(recipe, tmp_path):
    """Our kernels are deterministic; cuDNN's attention is not, so attention is written out."""
    same = recipe(**ON_DEVICE, run__accumulation=2, run__compile=False, run__attention="eager")
    with Session(same, tmp_path / "whole") as whole:
        for _ in range(8):
            whole.take_step()
        want = state.take(whole)
    with Session(same, tmp_path / "part") as part:
        for _ in range(4):
            part.take_step()
        checkpoint.write(tmp_path / "part" / CHECKPOINTS, state.take(part), keep=1)
    with Session(same, tmp_path / "part", resume=True) as resumed:
        for _ in range(4):
            resumed.take_step()
        got = state.take(resumed)
    for file, tensors in want.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(got.tensors[file][name], tensor), f"{file}: {name}"


def test_recomputation_changes_little_in_bfloat16(recipe, tmp_path):
    losses = []
    for again in (False, True):
        changes = {**ON_DEVICE, "run__activation_checkpointing": again, "run__compile": False}
        with Session(recipe(**changes), tmp_path / str(again)) as one:
            losses.append([one.take_step()[0].loss for _ in range(3)])
            assert one.balancer.total.sum(1).tolist() == [3 * 8 * 64 * 4] * 2
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_float8_trains_as_bfloat16_does(recipe, tmp_path, kind):
    pytest.importorskip("torchao", reason="the optional package torchao is not installed")
    losses = {}
    for float8 in ("none", kind):
        changes = {**ON_DEVICE, "run__float8": float8, "run__compile": float8 != "none"}
        with Session(recipe(**changes), tmp_path / float8) as one:
            losses[float8] = [one.take_step()[0].loss for _ in range(20)]
    assert losses[kind][-1] == pytest.approx(losses["none"][-1], abs=0.1)
