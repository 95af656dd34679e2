"""Runs the operators through torch's tools in Triton's interpreter on the CPU; prints what held.

A process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple

os.environ["TRITON_INTERPRET"] = "1"

import torch
from run_interpreted import SMALL, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogul.core.errors import BackendError
from mogul.kernels.layout import ExpertLayout
from mogul.kernels.triton import any_ops, layer, ops

layer.plan_for = lambda shape, tokens: SMALL


class Layer(nn.Module):
    """The layer as a module, its weights as parameters."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The operator between two others."""
        return ops.run(x * 2, self.gate_up, self.down, ids, weights) + x


def gradients(call, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Gradients of the leaves."""
    return list(torch.autograd.grad(call(), leaves, dout))


def same(given: list[Tensor], want: list[Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


def main() -> None:
    """One JSON object: what was asked -> whether it held."""
    x, gate_up, down, ids, weights = make(9, 32, 24, 4, 2, "random")
    module = Layer(gate_up, down)
    leaves = [x.requires_grad_(), module.gate_up, module.down]
    dout = torch.randn(9, 32)
    want = gradients(lambda: module(x, ids, weights), leaves, dout)
    recomputed = lambda: checkpoint(module, x, ids, weights, use_reentrant=False)  # noqa: E731
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    held = {
        "checkpoint": same(gradients(recomputed, leaves, dout), want),
        "compile": same(gradients(lambda: compiled(x, ids, weights), leaves, dout), want),
    }
    dim = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        call = (x.detach(), ids, weights)
        program = torch.export.export(module, call, dynamic_shapes=({0: dim},) * 3)
        other = make(17, 32, 24, 4, 2, "random")
        call = (other[0], other[3], other[4])
        held["export"] = torch.equal(program.module()(*call), module(*call))
        exported = program.module()
        held["export_one_node"] = program.graph_module.code.count("mogul.moe.default") == 1
    held["export_without_gradient"] = refuses(
        lambda: exported(*call).sum().backward(), "exported model has no gradient"
    )
    plain = [t.detach() for t in (x, gate_up, down, ids, weights)]
    held["residual"] = True
    for count in (1, 9):  # two launches without a sort, and a sorted forward
        x, ids, weights = plain[0][:count], plain[3][:count], plain[4][:count]
        args = (x, plain[1], plain[2], ids, weights)
        for residual in torch.randn(2, count, 32):  # the second time from a tape
            got, want = ops.moe_added(*args, residual), ops.moe(*args) + residual
            held["residual"] &= bool((got - want).abs().max() < 1e-5)
    for name, operator in (("moe", torch.ops.mogul.moe), ("moe_train", torch.ops.mogul.moe_train)):
        tests = ("test_schema", "test_faketensor")
        verdicts = torch.library.opcheck(operator.default, plain, test_utils=tests)
        held[name] = set(verdicts.values()) == {"SUCCESS"}
    held["strides"] = gradients_lie_as_said(plain)
    held["second_derivative"] = second_derivatives_are_refused(plain)
    print(json.dumps(held))


def second_derivatives_are_refused(plain: list[Tensor]) -> bool:
    """Of a gradient that is linear in the output, in both layers."""
    held = True
    for run in (ops.run, lambda *args: any_ops.run_any(*args, None, None, ExpertLayout())):
        x, gate_up, *rest = (t.clone().requires_grad_(t.is_floating_point()) for t in plain)
        (grad,) = torch.autograd.grad(run(x, gate_up, *rest).sum(), x, create_graph=True)
        loss = grad.square().sum()
        held &= refuses(loss.backward, "cannot be differentiated again")
    return held


def refuses(call, words: str) -> bool:
    """Whether a call raises our error with these words."""
    try:
        call()
    except BackendError as error:
        return words in str(error)
    return False


def gradients_lie_as_said(plain: list[Tensor]) -> bool:
    """Gradients of rows and weights that lie column by column, in both layers."""
    x, gate_up, down, ids, weights = plain
    x, weights = (t.T.contiguous().T for t in (x, weights))
    given = (x, gate_up, down, ids, weights)
    verdicts = {}
    for name, more, needs in (
        ("moe", (), (True, True)),
        ("moe_any", (None, None, *astuple(any_ops.Form.of(ExpertLayout()))), ()),
    ):
        _, *kept = getattr(torch.ops.mogul, f"{name}_train")(*given, *more)
        args = (torch.randn(x.shape), *given, *more[:2], *kept, *more[2:], *needs)
        operator = getattr(torch.ops.mogul, f"{name}_grad").default
        verdicts |= {name: torch.library.opcheck(operator, args, test_utils="test_faketensor")}
    return all(set(one.values()) == {"SUCCESS"} for one in verdicts.values())


if __name__ == "__main__":
    main()
