"""Balance: the losses by their formulas, the rules by what they reach, the counts exactly."""

from __future__ import annotations

import pytest
import torch

from mogul.core.errors import ConfigError
from mogul.kernels import RouterSpec, route
from mogul.models.balance_loss import balance_loss as models_balance_loss
from mogul.train.balance import Balancer
from mogul.train.balance_rules import (
    BalanceSection,
    bias_step,
    shift_to_mean,
    spread_of,
    warmed,
)
from mogul.train.objective import ChunkedLoss


def _ids(rows=4, length=12, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def _records(model, ids):
    """Logits and ids of every router."""
    found = []
    handles = [
        m.register_forward_hook(lambda _m, _a, out: found.append(out[:1] + out[2:3]))
        for m in model.modules()
        if hasattr(m, "spec")
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def _gradient_of(model, ids, section, micro_batches=1):
    """Router gradients that the losses add, and what the balancer counted."""
    plain, pulled = [], []
    for store, one in ((plain, BalanceSection(loss="none")), (pulled, section)):
        with Balancer(model, one, micro_batches=micro_batches) as balancer:
            for part in ids.chunk(micro_batches):
                (ChunkedLoss()(model, part) / micro_batches).backward()
            store += [r.weight.grad.clone() for r in balancer.routers]
            seen = balancer.count.clone(), balancer.losses.clone()
        model.zero_grad()
    return [b - a for a, b in zip(plain, pulled, strict=True)], seen


def _formula(model, ids, scope, per_group):
    """The loss written out: mean over layers of sum_i f_i p_i."""
    total = 0.0
    for logits, picks in _records(model, ids):
        pools = logits.unflatten(1, (2, -1)) if per_group else logits.unflatten(1, (1, -1))
        score = pools.softmax(-1).flatten(1) / (2 if per_group else 1)
        parts = len(ids) if scope == "sequence" else 1
        for s, p in zip(score.chunk(parts), picks.chunk(parts), strict=True):
            hot = torch.zeros(len(p), 8, dtype=s.dtype).scatter_(1, p, 1.0)
            load = hot.sum(0) * 8 / (2 * len(p))
            total = total + (load * s.mean(0)).sum() / parts / 2
    return total


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
@pytest.mark.parametrize("per_group", [False, True])
def test_the_loss_pulls_by_its_formula(tiny_model, scope, per_group):
    model, ids = tiny_model(), _ids()
    section = BalanceSection(loss=scope, loss_coef=0.5, loss_per_group=per_group)
    got, (_, losses) = _gradient_of(model, ids, section)
    want_loss = _formula(model, ids, scope, per_group)
    routers = [m for m in model.modules() if hasattr(m, "spec")]
    want = torch.autograd.grad(0.5 * want_loss, [r.weight for r in routers])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert losses[:, 0].mean().item() == pytest.approx(want_loss.item(), abs=1e-6)


def test_the_batch_loss_is_the_models_own(tiny_model):
    model, ids = tiny_model(), _ids()
    _, (_, losses) = _gradient_of(model, ids, BalanceSection(loss="batch"))
    logits, picks = zip(*_records(model, ids), strict=True)
    want = models_balance_loss(logits, picks, num_experts=8)
    assert losses[:, 0].mean().item() == pytest.approx(want.item(), abs=1e-5)


def test_the_global_loss_uses_the_counts_of_the_step_so_far(tiny_model):
    model, ids = tiny_model(), _ids(rows=4)
    section = BalanceSection(loss="global", loss_coef=1.0)
    got, (count, _) = _gradient_of(model, ids, section, micro_batches=2)
    records = [_records(model, part) for part in ids.chunk(2)]
    routers = [m for m in model.modules() if hasattr(m, "spec")]
    total, so_far = 0.0, torch.zeros(2, 8, dtype=torch.float64)
    for micro in records:
        for layer, (logits, picks) in enumerate(micro):
            so_far[layer] += picks.flatten().bincount(minlength=8)
            load = so_far[layer] / so_far[layer].mean()
            total = total + (load * logits.softmax(-1).mean(0)).sum() / 2 / 2  # layers, batches
    want = torch.autograd.grad(total, [r.weight for r in routers])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert torch.equal(count.double(), so_far)


def test_padding_counts_nothing(tiny_model):
    model, ids = tiny_model(), _ids()
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    with Balancer(model, BalanceSection(loss="batch")) as balancer:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert balancer.count.sum(1).tolist() == [4 * 9 * 2] * 2
        padded = balancer.losses.clone()
    logits, picks = zip(*_records_masked(model, ids, mask), strict=True)
    want = models_balance_loss(logits, picks, num_experts=8, attention_mask=mask)
    assert padded[:, 0].mean().item() == pytest.approx(want.item(), abs=1e-5)


def _records_masked(model, ids, mask):
    found = []
    handles = [
        m.register_forward_hook(lambda _m, _a, out: found.append((out[0], out[2])))
        for m in model.modules()
        if hasattr(m, "spec")
    ]
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return found


def test_evaluation_is_not_counted_and_the_model_is_given_back(tiny_model):
    model = tiny_model()
    names, classes = set(model.state_dict()), [type(m) for m in model.modules()]
    with Balancer(model, BalanceSection(loss="batch", bias="sign")) as balancer:
        assert set(model.state_dict()) == names
        with torch.no_grad():
            model.eval()(input_ids=_ids())
        assert balancer.count.sum() == 0
        model.train()
    assert [type(m) for m in model.modules()] == classes
    assert not [n for n, _ in model.named_buffers() if "balance" in n]


def test_a_skipped_step_leaves_the_bias(tiny_model):
    model = tiny_model()
    with Balancer(model, BalanceSection(loss="none", bias="sign")) as balancer:
        ChunkedLoss()(model, _ids())
        balancer.end_step(updated=False)
        assert all(not r.e_score_correction_bias.any() for r in balancer.routers)
        assert balancer.count.sum() == balancer.steps == 0
        ChunkedLoss()(model, _ids())
        balancer.end_step()
        assert all(r.e_score_correction_bias.any() for r in balancer.routers)


def _settle(
    section, *, score="softmax", groups=4, steps=400, tokens=1024, width=1.0, skew=0.7, nulls=0
):
    """MaxVio in groups before and after the rule worked on skewed scores (E = 64, K = 8)."""
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(64 + nulls, generator=generator) * skew
    offset[64:] += 2.0
    logits = (torch.randn(tokens, 64 + nulls, generator=generator) + offset) * width
    spec = RouterSpec(
        num_experts=64, top_k=8, num_groups=groups, score=score, num_null_experts=nulls
    )
    spread = spread_of(logits, 64, score)
    bias, found = torch.zeros(64 + nulls), []
    for step in range(1, steps + 1):
        ids = route(logits, spec, bias=bias).ids
        count = ids.flatten().bincount(minlength=65)[:64].float()
        pools = count.view(groups, -1)
        found.append((pools.max(1).values / pools.mean(1) - 1).max().item())
        score_TC = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        shift = shift_to_mean(score_TC + bias, ids, None, groups, 64)
        scale = {"spread": spread[None], "shift": shift[None]}
        step_L = bias_step(count[None], section, **scale, num_groups=groups, update=step)
        bias[:64] += step_L[0]
    assert bias[:64].view(groups, -1).sum(1).abs().max() < 1e-5  # the sum of a group stays
    return found


@pytest.mark.parametrize("rule", ["sign", "proportional", "decay", "quantile"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_every_rule_evens_the_groups_at_either_scale(rule, score):
    """One default rate must do for scores of mean 1/64 and of mean 1/2."""
    found = _settle(BalanceSection(bias=rule), score=score)
    assert found[0] > 1.0
    assert found[-1] < 0.2, found[-1]


@pytest.mark.parametrize("rule", ["proportional", "decay", "quantile"])
@pytest.mark.parametrize("width", [0.05, 0.3])
def test_new_routers_do_not_swing(rule, width):
    """Scores that hardly differ: a step that is a share of their mean overshoots every time."""
    found = _settle(BalanceSection(bias=rule), width=width, steps=60)
    assert max(found[-10:]) < 0.15, found[-10:]


@pytest.mark.parametrize("groups", [1, 4])
def test_the_shift_gives_the_mean_load(groups):
    """Moving one expert's bias by its shift, the others staying, it is picked that often."""
    generator = torch.Generator().manual_seed(1)
    choice = torch.rand(640, 16, generator=generator, dtype=torch.float64)
    choice += torch.rand(16, generator=generator, dtype=torch.float64)
    spec = RouterSpec(num_experts=16, top_k=4, num_groups=groups, score="sigmoid")

    def picks(scores):
        return route(torch.logit(scores / 4), spec).ids

    valid = torch.arange(640) < 480
    for mask, mean_load in ((None, 160), (valid, 120)):
        shift = shift_to_mean(choice, picks(choice), mask, groups, 16)
        seen = slice(None) if mask is None else mask
        for expert in range(16):
            moved = choice.clone()
            moved[:, expert] += shift[expert] + 1e-9
            assert (picks(moved)[seen] == expert).sum() == mean_load, expert


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_experts_are_evened_beside_null_experts(score):
    """Half of the picks are null: the mean load of true experts is half as large."""
    found = _settle(BalanceSection(bias="quantile"), score=score, nulls=8, steps=40)
    assert found[0] > 4.0
    assert found[-1] < 0.2, found[-1]


def test_one_sided_routers_are_evened_by_the_quantile_rule():
    """All tokens prefer the same experts by far: shares of the spread hardly move them."""
    after = {}
    for rule in ("proportional", "quantile"):
        found = _settle(BalanceSection(bias=rule), groups=1, steps=40, skew=3.0)
        after[rule] = found[-1]
    assert found[0] > 6.0
    assert after["quantile"] < 0.1 < 6.0 < after["proportional"], after


@pytest.mark.parametrize("rule", ["proportional", "quantile"])
def test_processes_move_the_bias_alike(tiny_model, rule):
    """Every process sees other tokens, but counts and the scale of the step are everyone's."""
    seen = []
    for seed in (0, 1):
        with Balancer(tiny_model(), BalanceSection(loss="none", bias=rule)) as one:
            torch.manual_seed(seed)
            ChunkedLoss()(one.model, torch.randint(0, 50, (2, 16)))
            spread = one.losses[:, 2:]
            sums = torch.cat((torch.ones_like(spread), spread, one.shift), dim=1)
            seen.append((one.count.clone(), sums))
    biases = []
    for seed in (0, 1):

        def reduce(mine, other=seen[1 - seed]):
            mine += other[0] if mine.shape == other[0].shape else other[1]

        section = BalanceSection(loss="none", bias=rule)
        with Balancer(tiny_model(), section, reduce=reduce) as balancer:
            torch.manual_seed(seed)
            ChunkedLoss()(balancer.model, torch.randint(0, 50, (2, 16)))
            balancer.end_step()
            biases.append([r.e_score_correction_bias.clone() for r in balancer.routers])
    assert biases[0][0].any()
    assert all(torch.equal(x, y) for x, y in zip(*biases, strict=True))


def test_a_model_without_a_bias_is_told(tiny_model):
    model = tiny_model(router_selection_bias=False)
    with pytest.raises(ConfigError, match="has no selection bias") as caught:
        Balancer(model, BalanceSection(bias="sign"))
    assert "router_selection_bias=true" in caught.value.__notes__[0]


def test_warm_up_starts_even_and_ends_exact(tiny_model):
    model, ids = tiny_model(), _ids(rows=16)
    for router in [m for m in model.modules() if hasattr(m, "spec")]:
        router.weight.data[0] = 10  # without a warm-up one expert of its group takes nearly all
    with Balancer(model, BalanceSection(loss="none", warmup_steps=4)) as balancer:
        balancer.begin_step(0)
        torch.manual_seed(0)
        ChunkedLoss()(model, ids)
        noisy = balancer.count.view(2, 2, 4)
        assert (noisy.max(-1).values / noisy.mean(-1)).max() < 1.5
        balancer.end_step()
        balancer.begin_step(4)
        warm = ChunkedLoss()(model, ids)
    assert torch.equal(warm, ChunkedLoss()(model, ids))


def test_warmed_keeps_mean_and_spread():
    torch.manual_seed(0)
    logits = torch.randn(4000, 64) * 3 + 2
    noise = warmed(logits, torch.tensor(0.0))
    assert noise.mean() == pytest.approx(logits.mean().item(), abs=0.05)
    assert noise.std() == pytest.approx(logits.std().item(), rel=0.02)
    assert torch.equal(warmed(logits, torch.tensor(1.0)), logits + 0 * noise)


def test_the_layer_of_multi_token_prediction_is_balanced_too(tiny_model):
    model = tiny_model(num_nextn_predict_layers=1)
    with Balancer(model, BalanceSection(loss="batch", loss_coef=1.0)) as balancer:
        assert balancer.layers == (0, 1, 2)
        ChunkedLoss()(model, _ids()).backward()
        assert balancer.count.sum(1).tolist() == [4 * 12 * 2] * 3
    model.config.mtp_loss_coef = 0.0
    assert Balancer(model, BalanceSection()).layers == (0, 1)


def test_stock_routers_are_balanced_too():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    with Balancer(model, BalanceSection(loss="batch", loss_coef=1.0)) as balancer:
        ChunkedLoss()(model, _ids()).backward()
        assert balancer.count.sum(1).tolist() == [4 * 12 * 2] * 2
        assert all(router.weight.grad.abs().sum() > 0 for router in balancer.routers)
    with pytest.raises(ConfigError, match="too late for a routing warm-up"):
        Balancer(model, BalanceSection(warmup_steps=3))
