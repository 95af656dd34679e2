import logging
from dataclasses import astuple, dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import BackendError, ConfigError
from mogul.kernels import MOE_FORWARD, ExpertLayout, choose_backend, moe, moe_forward
from mogul.kernels.cpu import moe as cpu_moe
from mogul.kernels.cpu import rows as cpu_rows

TOLERANCE = {  # relative to the largest value
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
}
LAYOUTS = {
    "qwen3": (ExpertLayout(), False),
    "interleaved, biases": (ExpertLayout(is_concatenated=False), True),
    "transposed": (ExpertLayout(is_transposed=True, activation="gelu_tanh"), False),
    "gpt-oss": (
        ExpertLayout(
            is_transposed=True, is_concatenated=False, activation="clamped_swiglu", limit=2.0
        ),
        True,
    ),
    "clamped SiLU": (ExpertLayout(activation="clamped_silu", limit=1.0), False),
    "no gate": (ExpertLayout(has_gate=False, activation="relu2"), True),
    "no gate, transposed": (ExpertLayout(is_transposed=True, has_gate=False, activation="gelu"),
                            False),
}  # fmt: skip
QWEN3 = ExpertLayout()
SIZES = {"small": (12, 6), "rows of 16 bytes": (16, 8)}  # the second suits grouped_mm
TOKENS = [0, 1, 2, 11, 90]


@dataclass
class Case:
    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    layout: ExpertLayout
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    def floats(self):
        return {"x": self.x, "gate_up": self.gate_up, "down": self.down, "weights": self.weights,
                **self.biases}  # fmt: skip

    def run(self, backend, dtype=None, **changed):
        floats = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.floats().items()}
        call = {**floats, "ids": self.ids, "layout": self.layout, "backend": backend, **changed}
        return moe_forward(**call)

    def gradients(self, backend, dtype=None):
        leaves = {
            name: tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()
            for name, tensor in self.floats().items()
        }
        y = moe_forward(**leaves, ids=self.ids, layout=self.layout, backend=backend)
        slope = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
        y.backward(slope)
        return {name: leaf.grad for name, leaf in leaves.items()}


def make_case(num_tokens, layout=QWEN3, has_bias=False, *, dtype=torch.float64, seed=0,
              num_experts=7, hidden=12, width=6, top_k=3):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    columns = width * (1 + layout.has_gate)
    gate_up, down = randn(num_experts, columns, hidden), randn(num_experts, hidden, width)
    if layout.is_transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    biases = {}
    if has_bias:
        biases = {
            "gate_up_bias": randn(num_experts, columns),
            "down_bias": randn(num_experts, hidden),
        }
    return Case(
        x=randn(num_tokens, hidden),
        gate_up=gate_up,
        down=down,
        weights=randn(num_tokens, top_k).abs(),
        # -1 and num_experts are slots without a row
        ids=torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator),
        layout=layout,
        biases=biases,
    )


def assert_near(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    if expected.numel() == 0:
        return
    bound = TOLERANCE[dtype] * max(float(expected.abs().max()), 1e-30)
    assert float((actual.double() - expected.double()).abs().max()) <= bound


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_cpu_equals_reference(name, num_tokens, dtype, sizes):
    case = make_case(num_tokens, *LAYOUTS[name], hidden=sizes[0], width=sizes[1])
    assert_near(case.run("cpu", dtype), case.run("reference"), dtype)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_cpu_gradients_equal_reference(name, num_tokens, dtype, sizes):
    case = make_case(num_tokens, *LAYOUTS[name], hidden=sizes[0], width=sizes[1])
    actual, expected = case.gradients("cpu", dtype), case.gradients("reference")
    assert actual.keys() == expected.keys()
    for key, grad in actual.items():
        assert_near(grad, expected[key], dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_gradients_are_those_of_finite_differences(backend, name):
    case = make_case(3, *LAYOUTS[name], hidden=3, width=2, num_experts=3, top_k=2)
    names = list(case.floats())

    def run(*tensors):
        floats = dict(zip(names, tensors, strict=True))
        return moe_forward(**floats, ids=case.ids, layout=case.layout, backend=backend)

    leaves = [tensor.requires_grad_() for tensor in case.floats().values()]
    torch.autograd.gradcheck(run, leaves, atol=1e-6)


def test_reference_is_the_formula():
    """Three lines by hand: one token, two picks."""
    case = make_case(1, top_k=2)
    case.ids = torch.tensor([[4, 2]])
    expected = torch.zeros(12, dtype=torch.float64)
    for pick, expert in enumerate([4, 2]):
        gate, up = (case.gate_up[expert] @ case.x[0]).split(6)
        expected += case.weights[0, pick] * (case.down[expert] @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(case.run("reference")[0], expected)


@pytest.mark.parametrize("num_tokens", [2, 12, 40, 300])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_in_chunks_and_tokens_as_columns_change_nothing(name, num_tokens, monkeypatch):
    case = make_case(num_tokens, *LAYOUTS[name], seed=5)
    whole, grads = case.run("cpu"), case.gradients("cpu")
    with monkeypatch.context() as chunked:
        chunked.setattr(cpu_rows, "CHUNK_ROWS", 5)
        torch.testing.assert_close(case.run("cpu"), whole, rtol=1e-12, atol=1e-12)
        for key, grad in case.gradients("cpu").items():
            torch.testing.assert_close(grad, grads[key], rtol=1e-12, atol=1e-12)
    if not case.layout.is_transposed:
        monkeypatch.setattr(cpu_moe, "_wants_columns", lambda *_: True)
        torch.testing.assert_close(case.run("cpu"), whole, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10_000), backend=st.sampled_from(["reference", "cpu"]),
       num_tokens=st.integers(1, 9))  # fmt: skip
def test_permuting_experts_changes_nothing_when_ids_follow(seed, backend, num_tokens):
    case = make_case(num_tokens, seed=seed)
    new_of_old = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    old_of_new = new_of_old.argsort()
    is_true = (case.ids >= 0) & (case.ids < 7)
    ids = torch.where(is_true, new_of_old[case.ids.clamp(0, 6)], case.ids)
    moved = case.run(backend, ids=ids, gate_up=case.gate_up[old_of_new], down=case.down[old_of_new])
    torch.testing.assert_close(moved, case.run(backend), rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10_000), backend=st.sampled_from(["reference", "cpu"]),
       num_tokens=st.integers(1, 9), far=st.sampled_from([-1, -3, 7, 8, 1000]))  # fmt: skip
def test_sentinel_slots_change_nothing_and_get_no_gradient(seed, backend, num_tokens, far):
    case = make_case(num_tokens, seed=seed)
    is_null = (case.ids < 0) | (case.ids >= 7)
    weights = case.weights.masked_fill(is_null, float("nan")).requires_grad_()
    ids = case.ids.masked_fill(is_null, far)
    y = case.run(backend, ids=ids, weights=weights)
    silent = case.run(backend, ids=ids.masked_fill(is_null, 0),
                      weights=case.weights.masked_fill(is_null, 0.0))  # fmt: skip
    torch.testing.assert_close(y, silent, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(y.sum(), weights)
    assert (grad[is_null] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_all_slots_without_a_row(backend, num_tokens):
    case = make_case(num_tokens, *LAYOUTS["gpt-oss"])
    case.ids = torch.full_like(case.ids, 7)
    assert (case.run(backend) == 0).all()
    for grad in case.gradients(backend).values():
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_without_tokens_get_zero_gradient_and_frozen_tensors_none(backend):
    case = make_case(20)
    case.ids = case.ids.clamp(0, 2)
    case.down.requires_grad_()
    case.run(backend).sum().backward()
    assert (case.down.grad[3:] == 0).all()
    assert (case.down.grad[:3] != 0).any()
    assert case.x.grad is case.gate_up.grad is None


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_of_any_integer_dtype_and_tensors_of_any_stride(ids_dtype):
    case = make_case(10)
    case.ids = case.ids.clamp(min=0)
    expected = case.run("cpu")
    strided = torch.stack([case.x, case.x], dim=2)[..., 0]
    ids = case.ids.to(ids_dtype).T.contiguous().T
    weights = case.weights.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(case.run("cpu", x=strided, ids=ids, weights=weights), expected)
    weight_view = case.gate_up.mT.contiguous().mT
    torch.testing.assert_close(case.run("cpu", gate_up=weight_view), expected)


def test_weights_of_any_stride_get_their_gradient():
    case = make_case(10)
    strided = case.weights.T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    case.run("cpu", weights=strided).sum().backward()
    plain = case.weights.clone().requires_grad_()
    case.run("cpu", weights=plain).sum().backward()
    assert torch.equal(strided.grad, plain.grad)


def test_same_bits_every_time():
    case = make_case(200, dtype=torch.float32, num_experts=5)
    first, grads = case.run("cpu"), case.gradients("cpu")
    for _ in range(3):
        assert torch.equal(case.run("cpu"), first)
        for name, grad in case.gradients("cpu").items():
            assert torch.equal(grad, grads[name])


def test_computes_in_the_dtype_of_the_weights_and_returns_that_of_x():
    case = make_case(6, dtype=torch.float32)
    y = case.run("cpu", gate_up=case.gate_up.bfloat16(), down=case.down.bfloat16())
    assert y.dtype == torch.float32
    assert_near(y.bfloat16(), case.run("reference"), torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast(backend):
    case = make_case(6, dtype=torch.float32)
    expected = case.run("reference")
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run(backend)
        grads = case.gradients(backend)
    assert y.dtype == torch.float32
    assert not torch.allclose(y, expected, rtol=1e-5)
    assert_near(y.bfloat16(), expected, torch.bfloat16)
    assert grads["gate_up"].dtype == torch.float32


@pytest.mark.parametrize("name", ["interleaved, biases", "gpt-oss"])
def test_one_operator_for_the_compiler(name):
    layout, has_bias = LAYOUTS[name]
    case = make_case(8, layout, has_bias, dtype=torch.float32)
    call = {**case.floats(), "ids": case.ids, "layout": layout}
    with torch.no_grad():
        got = torch.compile(moe_forward, fullgraph=True, backend="aot_eager")(**call)
    assert torch.equal(got, case.run("cpu"))


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_operator_tells_the_compiler_how_its_result_lies(tokens):
    case = make_case(tokens, dtype=torch.float32)
    turned = case.x.T.contiguous().T
    call = (turned, case.gate_up, case.down, case.ids, case.weights, None, None)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.mogul.moe_cpu.default,
            (*call, *astuple(ExpertLayout())),
            test_utils="test_faketensor",
        )


class Exported(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.gate_up, self.down = (torch.nn.Parameter(w) for w in (case.gate_up, case.down))

    def forward(self, x, ids, weights):
        return moe_forward(x, self.gate_up, self.down, ids, weights)


def test_export_with_any_number_of_tokens_but_without_gradient():
    case = make_case(8, dtype=torch.float32)
    tokens = torch.export.Dim("tokens", min=2)
    shapes = {key: {0: tokens} for key in ("x", "ids", "weights")}
    call = (case.x, case.ids, case.weights)
    module = torch.export.export(Exported(case), call, dynamic_shapes=shapes).module()
    part = {"x": case.x[:3], "ids": case.ids[:3], "weights": case.weights[:3]}
    got = module(*part.values())
    torch.testing.assert_close(got.detach(), case.run("cpu", **part))
    with pytest.raises(BackendError, match="exported model has no gradient of its experts"):
        got.sum().backward()


def test_training_in_one_graph_is_refused_with_the_reason():
    case = make_case(8, dtype=torch.float32)
    call = {**case.floats(), "ids": case.ids, "gate_up": case.gate_up.requires_grad_()}
    with pytest.raises(torch._dynamo.exc.Unsupported, match="trained outside of the compiled"):
        torch.compile(moe_forward, fullgraph=True, backend="eager")(**call)


@pytest.mark.full
def test_compiled_calls_agree():
    case = make_case(8, dtype=torch.float32)
    compiled = torch.compile(moe_forward, backend="eager", dynamic=True)
    call = {**case.floats(), "ids": case.ids, "layout": case.layout}
    torch.testing.assert_close(compiled(**call), case.run("cpu"))
    case.x.requires_grad_()
    (compiled(**call) ** 2).sum().backward()
    actual, case.x.grad = case.x.grad, None
    (case.run("cpu") ** 2).sum().backward()
    torch.testing.assert_close(actual, case.x.grad)


def test_checkpointing_agrees():
    from torch.utils.checkpoint import checkpoint

    case = make_case(8)
    case.x.requires_grad_()
    y = checkpoint(lambda x: case.run("cpu", x=x), case.x, use_reentrant=False)
    (actual,) = torch.autograd.grad(y.sum(), case.x)
    (expected,) = torch.autograd.grad(case.run("cpu").sum(), case.x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(4, 11).double()}, r"x \(4, 11\) is not \[T, 12\]"),
        ({"x": torch.zeros(5, 12).double()}, r"are not both \[5, K\]"),
        ({"weights": torch.zeros(4, 2)}, r"weights \(4, 2\) are not both \[4, K\]"),
        ({"ids": torch.zeros(4, 3)}, "ids are torch.float32, not integers"),
        ({"x": torch.zeros(4, 12, dtype=torch.int64)}, "both must be floating-point"),
        ({"gate_up": torch.zeros(7, 12, 12).to(torch.float8_e4m3fn)}, "gate_up is torch.float8"),
        ({"down": torch.zeros(7, 12, 6).to(torch.int8)}, "down is torch.int8, which has no"),
        ({"down": torch.zeros(7, 6, 12).double()}, r"expected \[E, 2F, D\] and \[E, D, F\]"),
        ({"layout": ExpertLayout(is_transposed=True)}, r"expected \[E, D, 2F\] and \[E, F, D\]"),
        ({"gate_up_bias": torch.zeros(7, 6)}, r"gate_up_bias \(7, 6\) is not \[7, 12\]"),
        ({"down_bias": torch.zeros(6, 12)}, r"down_bias \(6, 12\) is not \[7, 12\]"),
    ],
)
def test_calls_that_cannot_be(changed, words):
    with pytest.raises(ConfigError, match=words):
        make_case(4).run("auto", **changed)


def test_ids_are_checked_under_debug(monkeypatch):
    case = make_case(4)
    case.ids[0, 0] = 9
    case.run("cpu")
    monkeypatch.setattr(moe, "DEBUG", True)
    with pytest.raises(ConfigError, match=r"ids range from -?[0-9] to 9, but there are 7 experts"):
        case.run("cpu")


def test_layouts_that_cannot_be():
    with pytest.raises(ConfigError, match="no activation 'silo'") as caught:
        ExpertLayout(activation="silo")
    assert caught.value.__notes__ == ["fix: did you mean 'silu'?"]
    with pytest.raises(ConfigError, match="needs a gate half"):
        ExpertLayout(activation="clamped_swiglu", has_gate=False)


def test_choice_of_backend(caplog):
    assert choose_backend("cpu", torch.float32) == "cpu"
    with pytest.raises(
        BackendError, match="backend 'cpu' cannot run here: the tensors are on meta"
    ):
        choose_backend("meta", torch.float32, backend="cpu")
    with pytest.raises(BackendError, match="moe_forward has no backend 'gpu'"):
        choose_backend("cpu", torch.float32, backend="gpu")
    with caplog.at_level(logging.WARNING, logger="mogul"):
        assert choose_backend("meta", torch.float32, num_experts=3) == "reference"
    assert "slow reference backend on meta" in caplog.text


def test_a_backend_added_later_is_told_the_facts_and_chosen_first(monkeypatch):
    monkeypatch.setattr(MOE_FORWARD, "_entries", dict(MOE_FORWARD._entries))
    told = {}

    def why_not(**facts):
        told.update(facts)
        return None if facts["needs_grad"] else "inference only by others"

    def answer(x, *_args, **_kwargs):
        return x * 0 + 7

    MOE_FORWARD.add("newcomer", answer, why_not=why_not, first=True)
    case = make_case(4)
    assert (case.run("auto") != 7).all()
    assert (case.run("auto", x=case.x.requires_grad_()) == 7).all()
    assert told == {
        "device": torch.device("cpu"), "dtype": torch.float64, "num_experts": 7, "hidden_size": 12,
        "expert_width": 6, "top_k": 3, "layout": case.layout, "has_bias": False, "needs_grad": True,
        "is_transformed": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gate_up", "down", "ids", "weights", "gate_up_bias", "down_bias"])
def test_a_tensor_elsewhere_is_refused_after_calls_of_its_kind_too(name):
    case = make_case(4, has_bias=True)
    case.run("cpu")
    elsewhere = {name: case.ids if name == "ids" else case.floats()[name]}
    with pytest.raises(ConfigError, match=f"x is on cpu, .*{name} on meta"):
        case.run("cpu", **{name: elsewhere[name].to("meta")})


def test_a_kind_of_call_is_settled_once_and_never_while_tracing(monkeypatch):
    case, settled = make_case(4), []
    real = moe._settle
    monkeypatch.setattr(moe, "_settle", lambda *args: settled.append(args) or real(*args))
    moe.forget_calls()
    want = case.run("cpu")
    assert torch.equal(case.run("cpu"), want)
    assert len(settled) == len(moe._SETTLED) == 1
    case.run("cpu", x=case.x[:2], ids=case.ids[:2], weights=case.weights[:2])
    with pytest.raises(ConfigError):
        case.run("cpu", ids=case.ids[:2])
    assert len(settled) == 3
    assert len(moe._SETTLED) == 2  # what is refused is refused again
    kept = dict(moe._SETTLED)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(case.run("cpu"), want)
    assert kept == moe._SETTLED
