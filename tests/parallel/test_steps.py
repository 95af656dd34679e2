"""Experts in steps: sums arrive at their ranks as one process computes them; who may take them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mogul.models.experts import experts_backend
from mogul.parallel.local import LocalExperts, local_experts, matrices_of


def test_sums_arrive_at_their_ranks_as_one_process_computes_them():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_steps.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.endswith("stepped\n"), done.stderr


class Experts(nn.Module):
    """What matters of an experts module of Transformers."""

    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_experts_implementation="mogul")
        self.act_fn: nn.Module = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 4))

    def _apply_gate(self, hidden):
        raise AssertionError("not called")

    def local_forward(self, x, ids, weights):
        return x * weights.sum(1, keepdim=True)


def stock(monkeypatch) -> Experts:
    from transformers.integrations import moe

    monkeypatch.setattr(Experts, "_apply_gate", moe._default_apply_gate)
    return Experts()


def test_matrices_are_those_of_mogul_s_own_layout_only(monkeypatch):
    experts = stock(monkeypatch)
    found = matrices_of(experts)
    assert found is not None
    assert found[0] is experts.gate_up_proj
    with experts_backend("reference"):
        assert matrices_of(experts) is None
    experts.config._experts_implementation = "eager"
    assert matrices_of(experts) is None
    other = stock(monkeypatch)
    other.is_transposed = True
    assert matrices_of(other) is None
    odd = stock(monkeypatch)
    odd.act_fn = nn.Hardswish()
    assert matrices_of(odd) is None


def test_weights_that_kernels_cannot_read_take_no_steps(monkeypatch):
    monkeypatch.setattr("mogul.parallel.local.choose_backend", lambda *_, **_facts: "triton")
    experts = stock(monkeypatch)
    x = torch.ones(3, 4)
    assert local_experts(experts).in_steps(x, 2) == (experts.gate_up_proj, experts.down_proj)
    moved = torch.randn(2 * 4 * 4 + 1)[1:].view(2, 4, 4)
    for other in (moved, torch.randn(2, 4, 4).transpose(1, 2)):
        experts.down_proj = nn.Parameter(other)
        assert local_experts(experts).in_steps(x, 2) is None


def test_a_processor_takes_no_steps_and_adds_what_stands_beside(monkeypatch):
    experts = stock(monkeypatch)
    local = local_experts(experts, lambda x: 10 * x)
    x, ids, weights = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
    assert local.in_steps(x, 2) is None
    assert torch.equal(local(x, ids, weights), 12 * x)
    assert LocalExperts(experts.local_forward, lambda: None).in_steps(x, 2) is None
