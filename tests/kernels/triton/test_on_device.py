"""The Triton experts layer on an NVIDIA GPU: numbers, graphs, compile, export, bad input."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogul.core.errors import BackendError
from mogul.kernels import choose_backend, moe_forward

pytestmark = pytest.mark.gpu

SIZES = {
    "small": (256, 200, 8, 2),
    "wide": (512, 320, 16, 4),
    "one": (128, 64, 4, 4),
    "odd": (488, 328, 16, 4),
}
"""Width, inner, experts, picks; 200 and 320 leave a narrow last column tile, 488 and 328 a last
step of each product that is not full."""
LIMIT = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


def make(
    size: str, tokens: int, kind: str = "random", dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """x, gate_up, down, ids, weights."""
    width, inner, experts, picks = SIZES[size]
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, device="cuda", generator=generator) * scale
        return value.to(dtype)

    score = torch.rand(tokens, experts, device="cuda", generator=generator)
    if kind == "skewed":
        score[: tokens * 9 // 10, 1] += 2
    if kind == "empty":
        score[:, : experts // 2] -= 2
    weights, ids = score.topk(picks, -1)
    if kind == "null":
        ids[::2, -1] = experts
        ids[1::3, 0] = -1
    gate_up = normal(experts, 2 * inner, width, scale=width**-0.5)
    down = normal(experts, width, inner, scale=inner**-0.5)
    return [normal(tokens, width), gate_up, down, ids, weights.softmax(-1)]


def relative(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def gradients(tensors: list[Tensor], dout: Tensor, backend: str, **options: bool) -> list[Tensor]:
    """Output and the gradients of x, gate_up, down, weights; fp32 for the reference."""
    x, gate_up, down, ids, weights = tensors
    if backend == "reference":
        x, gate_up, down, dout = (t.float() for t in (x, gate_up, down, dout))
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = moe_forward(*leaves[:3], ids, leaves[3], backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout, **options)]


CASES = [
    *itertools.product(("small",), (1, 7, 64, 300), ("random",)),
    *itertools.product(("small",), (64,), ("skewed", "empty", "null")),
    *itertools.product(("wide",), (3000,), ("random", "skewed", "empty", "null")),
    ("one", 5, "random"),
    ("one", 2500, "null"),
    ("odd", 3000, "null"),
]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("size", "tokens", "kind"), CASES)
def test_equals_reference_with_gradients(
    size: str, tokens: int, kind: str, dtype: torch.dtype
) -> None:
    tensors = make(size, tokens, kind, dtype)
    torch.manual_seed(tokens)
    with torch.no_grad():  # along the output: else the d weight of one token nearly cancels
        dout = moe_forward(*tensors, backend="reference")
    dout += torch.randn_like(dout)
    want = gradients(tensors, dout, "reference")
    with torch.no_grad():
        assert relative(moe_forward(*tensors, backend="triton"), want[0]) <= LIMIT[dtype]
    given = gradients(tensors, dout, "triton")
    for name, a, b in zip(("out", "dx", "dgate_up", "ddown", "dw"), given, want, strict=True):
        assert relative(a, b) <= LIMIT[dtype], name
    again = gradients(tensors, dout, "triton")
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.parametrize("tokens", [64, 3000])
def test_a_second_backward_of_one_graph_is_the_same(tokens: int) -> None:
    x, gate_up, down, ids, weights = make("wide", tokens)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    out = moe_forward(x, gate_up, down, ids, weights, backend="triton")
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_a_replayed_forward_is_the_recorded_one_on_other_tensors(tokens: int) -> None:
    from mogul.kernels.triton import ops
    from mogul.kernels.triton.tape import Tape

    sets = [make("wide", tokens, kind) for kind in ("random", "null", "skewed")]
    with torch.no_grad():
        want = [
            moe_forward(*(t.float() for t in one[:3]), *one[3:], backend="reference")
            for one in sets
        ]
        layer = ops.layer_of_call(sets[0][0], sets[0][2], sets[0][3], sets[0][4])
        layer.tapes._known.clear()
        first = moe_forward(*sets[0], backend="triton")
        assert list(map(type, layer.tapes._known.values())) == [Tape]
        for _ in range(3):
            for one, expected in zip(sets, want, strict=True):
                got = moe_forward(*one, backend="triton")
                assert relative(got, expected) <= LIMIT[torch.bfloat16]
        assert torch.equal(moe_forward(*sets[0], backend="triton"), first)


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_a_captured_graph_follows_its_input(tokens: int) -> None:
    x, *rest = make("wide", tokens)
    other = torch.randn_like(x)
    with torch.no_grad():
        moe_forward(x, *rest, backend="triton")
        want = moe_forward(other, *rest, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe_forward(x, *rest, backend="triton")
        x.copy_(other)
        graph.replay()
    assert torch.equal(out, want)


def test_a_training_step_can_be_captured() -> None:
    x, gate_up, down, ids, weights = make("wide", 3000)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    dout = torch.randn_like(x)

    def step() -> tuple[Tensor, ...]:
        out = moe_forward(x, gate_up, down, ids, weights, backend="triton")
        return torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = step()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


class Layer(nn.Module):
    """The layer as a module, its weights as parameters."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x * 2, self.gate_up, self.down, ids, weights, backend="triton") + x


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_compiles_without_a_break(tokens: int) -> None:
    x, gate_up, down, ids, weights = make("wide", tokens)
    layer = Layer(gate_up, down)
    x.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    leaves = [x, layer.gate_up, layer.down]
    dout = torch.randn_like(x)
    want = torch.autograd.grad(layer(x, ids, weights), leaves, dout)
    given = torch.autograd.grad(compiled(x, ids, weights), leaves, dout)
    assert all(relative(a, b) <= 1e-3 for a, b in zip(given, want, strict=True))


def test_exports_with_a_dynamic_number_of_tokens() -> None:
    x, gate_up, down, ids, weights = make("wide", 64)
    layer = Layer(gate_up, down)
    dim = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(layer, (x, ids, weights), dynamic_shapes=({0: dim},) * 3)
        assert "mogul.moe.default" in program.graph_module.code
        other = make("wide", 300)
        call = (other[0], other[3], other[4])
        assert torch.equal(program.module()(*call), layer(*call))


def test_checkpointing_recomputes_the_same() -> None:
    x, gate_up, down, ids, weights = make("wide", 3000)
    layer, dout = Layer(gate_up, down), torch.randn_like(x)
    leaves = [x.requires_grad_(), layer.gate_up, layer.down]
    want = torch.autograd.grad(layer(x, ids, weights), leaves, dout)
    again = checkpoint(layer, x, ids, weights, use_reentrant=False)
    given = torch.autograd.grad(again, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


def test_two_streams_at_once() -> None:
    """Two layers in flight must neither wait for each other for ever nor mix."""
    inputs = [make("wide", 3000), make("small", 2900)]
    with torch.no_grad():
        want = [moe_forward(*tensors, backend="triton") for tensors in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        for _ in range(20):
            given = []
            for stream, tensors in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    given.append(moe_forward(*tensors, backend="triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


def test_bad_weights_are_refused_by_name() -> None:
    x, gate_up, down, ids, weights = make("wide", 64)
    turned = gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(BackendError, match="gate_up with strides"):
        moe_forward(x, turned, down, ids, weights, backend="triton")
    shifted = torch.empty(down.numel() + 1, device="cuda", dtype=down.dtype)[1:].view_as(down)
    with pytest.raises(BackendError, match=r"down with strides .* at address"):
        moe_forward(x, gate_up, shifted, ids, weights, backend="triton")
    with pytest.raises(BackendError, match=r"float32; bfloat16 and float16"):
        moe_forward(x.float(), gate_up.float(), down.float(), ids, weights, backend="triton")
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        moe_forward(*(t.cpu() for t in (x, gate_up, down, ids, weights)), backend="triton")


def test_unaligned_inputs_are_copied_not_misread() -> None:
    x, gate_up, down, ids, weights = make("wide", 64)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    want = moe_forward(x, gate_up, down, ids, weights, backend="triton")
    assert torch.equal(moe_forward(shifted, gate_up, down, ids, weights, backend="triton"), want)
    assert choose_backend(x.device, x.dtype) == "triton"


def test_backward_in_a_thread_that_never_called_the_device():
    x, gate_up, down, ids, weights = make("wide", 4096)
    with torch.enable_grad():
        out, pre, sort = torch.ops.mogul.moe_train(x, gate_up, down, ids, weights)
    args = (torch.ones_like(out), x, gate_up, down, ids, weights, pre, sort, True, True)
    want = torch.ops.mogul.moe_grad(*args)  # leaves all memory that the thread will ask for
    torch.cuda.synchronize()
    want = [tensor.clone() for tensor in want]
    found: list[tuple[Tensor, ...]] = []
    thread = threading.Thread(target=lambda: found.append(torch.ops.mogul.moe_grad(*args)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found[0], want, strict=True))
