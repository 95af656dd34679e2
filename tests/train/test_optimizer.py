"""The optimizer against torch's own and against singular values; masters lose nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from mogul.core.errors import ArtifactError, ConfigError
from mogul.train import muon_adamw
from mogul.train.halves import join, split
from mogul.train.muon import Slices
from mogul.train.muon_adamw import MuonAdamW
from mogul.train.newton_schulz import orthogonalise
from mogul.train.optimizer import OptimizerSpec, build_optimizer
from mogul.train.step import Stepper


@given(
    arrays.arrays(
        "float32", 16, elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
    )
)
def test_halves_are_the_whole(values):
    wide = torch.from_numpy(values)
    high, low = split(wide)
    assert torch.equal(join(high, low), wide)
    # The half that the model computes with is as close as a bfloat16 can be.
    assert ((high.float() - wide).abs() <= wide.abs() * 2**-8).all()


def _pair(dtype):
    """A layer, and the same in float32 with torch's AdamW."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 30).to(dtype)
    twin = nn.Linear(40, 30).to(torch.promote_types(dtype, torch.float32))
    twin.load_state_dict(layer.state_dict())
    groups = [
        {"params": [twin.weight], "weight_decay": 0.1},
        {"params": [twin.bias], "weight_decay": 0.0},
    ]
    return layer, twin, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_adamw_is_torchs(dtype, factor, monkeypatch):
    monkeypatch.setattr(muon_adamw, "LARGE", 1000)  # the weight in halves, the bias as a copy
    layer, twin, want = _pair(dtype)
    got = build_optimizer(layer, OptimizerSpec(lr=0.01))
    for _ in range(6):
        gradients = [torch.randn_like(p) for p in twin.parameters()]
        for p, g in zip(twin.parameters(), gradients, strict=True):
            p.grad = g * factor
        want.step()
        got.update([g.clone() for g in gradients], factor)
    tolerance = {torch.float64: 1e-12}.get(dtype, 2e-6)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        state = got.state[p]
        master = join(p.detach(), state["low"]) if "low" in state else state.get("master", p)
        assert (master - q).abs().max() < tolerance
        assert (p - q).abs().max() <= tolerance + q.abs().max() * torch.finfo(dtype).eps


def test_bfloat16_weights_move_by_less_than_they_can_show(monkeypatch):
    """Steps far below the spacing of bfloat16 must add up."""
    monkeypatch.setattr(muon_adamw, "LARGE", 1)
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = MuonAdamW([{"params": [weight]}], lr=1e-5)
    for _ in range(1000):
        optimizer.update([torch.ones(64)])
    assert weight.detach().float().mean() == pytest.approx(0.99, abs=2**-8)
    assert join(weight.detach(), optimizer.state[weight]["low"]).mean() == pytest.approx(
        0.99, abs=1e-4
    )


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 48, 16), (24, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_newton_schulz_evens_singular_values(shape, dtype):
    torch.manual_seed(1)
    stack = torch.randn(*shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    stack = u @ torch.diag_embed(s.clamp(min=0.05 * s.max())) @ v
    got = orthogonalise(stack.to(dtype)).double()
    values = torch.linalg.svdvals(got)
    assert 0.8 < values.min() <= values.max() < 1.2
    # The directions are those of the exact polar factor.
    cosine = (got * (u @ v)).sum((-2, -1)) / got.norm(dim=(-2, -1)) / (u @ v).norm(dim=(-2, -1))
    assert cosine.min() > 0.98


def _parts(stack, slices):
    """Gate and up of every expert, cut out by hand."""
    axis = slices.dim
    size = stack.shape[axis] // 2
    first, second = torch.arange(0, size), torch.arange(size, 2 * size)
    if slices.interleaved:
        first, second = 2 * first, 2 * first + 1
    return [m.index_select(axis, part).clone() for part in (first, second) for m in stack]


@pytest.mark.parametrize(
    "slices",
    [
        Slices(-2, 2),
        Slices(-2, 2, interleaved=True),
        Slices(-1, 2),
        Slices(-1, 2, interleaved=True),
    ],
)
def test_every_expert_matrix_is_stepped_alone(slices):
    """A stack of experts moves as its gate and up matrices would, one by one."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 12, dtype=torch.float64))
    parts = _parts(stack.detach(), slices)
    singles = [nn.Parameter(m.clone()) for m in parts]
    options = {"kind": "muon", "weight_decay": 0.1}
    whole = MuonAdamW([{"params": [stack], **options}], lr=0.1, slices={stack: slices})
    alone = MuonAdamW([{"params": singles, **options}], lr=0.1)
    for _ in range(3):
        gradient = torch.randn_like(stack)
        whole.update([gradient.clone()])
        alone.update([m.clone() for m in _parts(gradient, slices)])
    moved = torch.stack(_parts(stack.detach(), slices))
    assert (moved - torch.stack([m.detach() for m in singles])).abs().max() < 1e-12
    # A common norm of the stack would have made them depend on each other.
    assert (moved[0] - parts[0]).norm() > 0.01


def test_muon_takes_matrices_of_the_decoder_only(tiny_model):
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerSpec(kind="muon"))
    names = {p: n for n, p in model.named_parameters()}
    muon = {names[p] for g in optimizer.param_groups if g["kind"] == "muon" for p in g["params"]}
    assert {n.split(".", 3)[-1] for n in muon} == {
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        "self_attn.o_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    }  # fmt: skip
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(names)


def test_state_goes_over_by_name(tiny_model):
    first, second = tiny_model(), tiny_model()
    optimizers = [build_optimizer(m, OptimizerSpec(kind="muon", lr=0.1)) for m in (first, second)]
    names = [{p: n for n, p in m.named_parameters()} for m in (first, second)]
    gradients = [torch.randn_like(p) for p in optimizers[0].parameters]
    optimizers[0].update(gradients)
    second.load_state_dict(first.state_dict())
    tensors = {n: t.clone() for n, t in optimizers[0].tensors(names[0])}
    optimizers[1].restore(names[1], tensors, num_updates=1)
    for optimizer in optimizers:
        optimizer.update([g.clone() for g in gradients], 0.5)  # scaled in place
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    del tensors["model.norm.weight:exp_avg"]
    with pytest.raises(ArtifactError, match=r"norm\.weight:exp_avg is missing"):
        optimizers[1].restore(names[1], tensors, num_updates=1)


def test_an_optimizer_of_stale_parameters_is_refused(tiny_model):
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerSpec())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match="parameters that the model no longer has"):
        Stepper(model, optimizer)


def test_parameters_swapped_in_the_first_forward_are_refused(tiny_model):
    model = tiny_model()
    stepper = Stepper(model, build_optimizer(model, OptimizerSpec()))

    def swap(module, _args):
        module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())

    model.register_forward_pre_hook(swap)
    with pytest.raises(ConfigError, match="parameters that the model no longer has"):
        stepper.gradients([torch.zeros(1, 4, dtype=torch.long)])


def _muon_masters(monkeypatch, large, *, compile=False):
    """Float32 weights after steps with Muon; in the second one gradient is missing."""
    monkeypatch.setattr(muon_adamw, "LARGE", large)
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(2, 8, 12).bfloat16()) for _ in range(3)]
    optimizer = MuonAdamW(
        [{"params": weights, "kind": "muon", "weight_decay": 0.1}],
        lr=0.01,
        slices=dict.fromkeys(weights[:2], Slices(-2, 2)),
        compile=compile,
    )
    for step in range(3):
        gradients = [torch.randn(2, 8, 12).bfloat16() for _ in weights]
        optimizer.update([None if step == place == 1 else g for place, g in enumerate(gradients)])
    states = [optimizer.state[w] for w in weights]
    return [
        join(w.detach(), s["low"]) if "low" in s else s["master"]
        for w, s in zip(weights, states, strict=True)
    ]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.full)])
def test_muon_in_halves_is_muon_with_masters(monkeypatch, compile):
    """One kernel over all weights of a shape moves them as their float32 copies would."""
    halves = _muon_masters(monkeypatch, 1, compile=compile)
    copies = _muon_masters(monkeypatch, 1 << 40)
    for got, want in zip(halves, copies, strict=True):
        assert (got - want).abs().max() < 1e-6
        assert (got - got.bfloat16().float()).abs().max() > 1e-5  # finer than bfloat16


def test_muon_keeps_the_precision_of_every_stack():
    """A float64 matrix moves in float64 whatever kind of matrix stands before it."""
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 8, 12, dtype=torch.float64)
    alone, beside = (nn.Parameter(start.clone()) for _ in range(2))
    small = nn.Parameter(torch.randn(6, 4))
    MuonAdamW([{"params": [alone], "kind": "muon"}], lr=0.1 / 3).update([gradient], 1 / 3)
    both = MuonAdamW([{"params": [small, beside], "kind": "muon"}], lr=0.1 / 3)
    both.update([torch.randn(6, 4), gradient], 1 / 3)
    assert torch.equal(alone, beside)
