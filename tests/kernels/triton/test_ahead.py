"""What a first call compiles together: all that it launches, once, and without a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mogul.kernels.triton import ahead
from mogul.kernels.triton.launch import listening
from mogul.kernels.triton.layer import Layer
from mogul.kernels.triton.plans import Shape

SHAPE = Shape(experts=128, picks=8, width=256, inner=128)


def inputs(tokens: int) -> tuple[Tensor, ...]:
    """x, gate_up, down, ids, weights without memory."""
    sizes = ((tokens, 256), (128, 256, 256), (128, 256, 128), (tokens, 8), (tokens, 8))
    dtypes = (torch.bfloat16,) * 3 + (torch.int64, torch.float32)
    return tuple(
        torch.empty(size, dtype=dtype, device="meta")
        for size, dtype in zip(sizes, dtypes, strict=True)
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the kernels of each round of compilation."""
    rounds: list[list[str]] = []
    monkeypatch.setattr(ahead, "INTERPRETED", False)
    monkeypatch.setattr(
        ahead,
        "compile_together",
        lambda waiting, _device: rounds.append([one.kernel.__name__ for one, _ in waiting]),
    )
    return rounds


@pytest.mark.parametrize("tokens", [1, 64, 3000, 9000])
@pytest.mark.parametrize("train", [False, True])
def test_everything_that_a_call_launches_compiles_in_one_round(
    compiled: list[list[str]], tokens: int, train: bool
) -> None:
    layer = Layer(SHAPE, 0, pdl=True)
    ahead.compile_ahead(layer, inputs(tokens), train=train)
    with listening(launch=False) as heard:
        if tokens == 1 and not train:
            layer.few(*inputs(tokens))
        else:
            out, pre, sort = layer.forward(*inputs(tokens), save=train)
            if train:
                layer.backward(out, *inputs(tokens), pre, sort)
    wanted = {id(launch): launch.kernel.__name__ for launch, _, _ in heard}
    assert [sorted(names) for names in compiled] == [sorted(wanted.values())]
    assert ("sum_parts" in compiled[0]) == train


def test_a_kind_of_call_is_rehearsed_once(compiled: list[list[str]]) -> None:
    layer = Layer(SHAPE, 0, pdl=True)
    for tokens in (600, 601, 611):  # one plan, one block of the sort
        ahead.compile_ahead(layer, inputs(tokens), train=False)
    assert len(layer.ready) == len(compiled) == 1
    ahead.compile_ahead(layer, inputs(600), train=True)
    assert len(layer.ready) == len(compiled) == 2
    assert layer.tapes._known == {}
