"""Accumulation, recomputation and compilation change speed and memory, not the training.

Float64, with the routing margins asserted, so that no rounding can flip a pick.
"""

from __future__ import annotations

import pytest
import torch

from mogul.train.balance import Balancer
from mogul.train.balance_rules import BalanceSection
from mogul.train.layers import prepared_layers
from mogul.train.objective import ChunkedLoss, model_loss
from mogul.train.optimizer import OptimizerSpec, build_optimizer
from mogul.train.step import Stepper

STEPS = 5
# Terms that are means over tokens or sequences, so that a batch may be cut anywhere between rows.
LINEAR = BalanceSection(loss="sequence", loss_coef=0.02, z_loss_coef=1e-3)


def _batches(seed: int = 1, rows: int = 8, length: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (rows, length), generator=generator) for _ in range(STEPS)]


def _train(model, *, parts=1, recompute=False, compile=False, kind="adamw", section=LINEAR):
    """Losses of five steps, gradients of the first, counts of the first, and the weights."""
    optimizer = build_optimizer(model, OptimizerSpec(lr=0.01, kind=kind))
    losses, gradients, counts = [], {}, None
    names = {p: n for n, p in model.named_parameters()}
    balancer = Balancer(model, section, micro_batches=parts, compiled=bool(compile))
    with prepared_layers(model, compile=compile, recompute=recompute), balancer:
        stepper = Stepper(model, optimizer, ChunkedLoss())
        for step, batch in enumerate(_batches()):
            balancer.begin_step(step)
            found = stepper.gradients(batch.chunk(parts))
            if step == 0:
                pairs = zip(optimizer.parameters, found.tensors, strict=True)
                gradients = {names[p]: g.clone() for p, g in pairs}
                counts = balancer.count.clone()
            losses.append(found.loss)
            stepper.update(found, 0.01)
            balancer.end_step()
    return losses, gradients, counts, {n: p.detach().clone() for n, p in model.named_parameters()}


def _smallest_margin(model) -> float:
    """Distance between the last pick and the first expert left out, over all groups and tokens."""
    margins = []

    def see(router, _args, output):
        groups = output[0].detach().unflatten(1, (router.spec.num_groups, -1))
        best = groups.topk(router.spec.picks_per_group + 1, dim=-1).values
        margins.append((best[..., -2] - best[..., -1]).min().item())

    handles = [m.register_forward_hook(see) for m in model.modules() if hasattr(m, "spec")]
    for batch in _batches():
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return min(margins)


@pytest.fixture
def plain(tiny_model):
    model = tiny_model()
    assert _smallest_margin(model) > 1e-6
    return _train(model)


WAYS = {
    "accumulated": {"parts": 4},
    "recomputed": {"recompute": True},
    "every second recomputed": {"recompute": 2, "parts": 2},
    "traced, recomputed, accumulated": {"compile": "aot_eager", "recompute": True, "parts": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_same_gradients_and_losses(plain, tiny_model, way):
    losses, gradients, counts, _ = _train(tiny_model(), **WAYS[way])
    for name, want in plain[1].items():
        assert (gradients[name] - want).abs().max() < 1e-9, name
    assert losses == pytest.approx(plain[0], abs=1e-8)
    # Recomputed layers see their tokens twice and count them once.
    assert torch.equal(counts, plain[2])
    assert counts.sum() == 2 * 8 * 12 * 2


@pytest.mark.full
def test_same_when_compiled_for_real(plain, tiny_model):
    losses, gradients, _, _ = _train(tiny_model(), compile=True, parts=2)
    for name, want in plain[1].items():
        assert (gradients[name] - want).abs().max() < 1e-9, name
    assert losses == pytest.approx(plain[0], abs=1e-8)


def test_float32_is_close_to_float64(plain, tiny_model):
    losses, gradients, _, _ = _train(tiny_model(dtype=torch.float32), parts=2, recompute=True)
    assert losses[0] == pytest.approx(plain[0][0], abs=1e-5)
    for name, want in plain[1].items():
        assert (gradients[name] - want).abs().max() < 1e-5, name


def test_layers_share_one_graph(tiny_model):
    """A graph a layer would compile for minutes, and stop at torch's limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(num_hidden_layers=4)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        _train(model, compile="aot_eager")


def test_the_chunked_loss_is_the_models_own(tiny_model, monkeypatch):
    model, batch = tiny_model(), _batches()[0]
    want = model_loss(model, batch)
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(
        "mogul.train.objective.CHUNK_ELEMENTS", 64 * 30 * 128
    )  # chunks of 256 at least: one
    loss = ChunkedLoss()(model, batch)
    (loss * 3).backward()
    # The model casts its logits to float32.
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad / 3 - gradients[name]).abs().max() < 1e-6, name


def test_the_chunked_loss_counts_nothing_after_the_last_token(tiny_model):
    model, batch = tiny_model(), _batches()[0]
    changed = batch.clone()
    changed[:, 0] = 0  # seen, never predicted
    hidden = torch.randn(8, 12, 32, dtype=torch.float64)
    from mogul.train.objective import chunked_loss

    weight = model.lm_head.weight
    assert chunked_loss(hidden, weight, batch) == chunked_loss(hidden, weight, changed)
    shifted = chunked_loss(hidden, weight, batch, shift=2)
    logits = (hidden @ weight.T)[:, :-2].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, batch[:, 2:].flatten())
    assert shifted.item() == pytest.approx(want.item(), abs=1e-12)


def test_the_chunked_loss_trains_multi_token_prediction(tiny_model):
    model, batch = tiny_model(num_nextn_predict_layers=1), _batches()[0]
    want = model_loss(model, batch)
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss = ChunkedLoss()(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-6, name
