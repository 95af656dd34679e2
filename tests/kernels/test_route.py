import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import BackendError, ConfigError
from mogul.kernels import ROUTE, RouterSpec, route


@st.composite
def routers(draw):
    """A rule, logits, a selection bias and a scale that fit it."""
    num_groups = draw(st.sampled_from([1, 2, 4]))
    group_size = draw(st.integers(2, 6))
    top_k = num_groups * draw(st.integers(1, group_size))
    spec = RouterSpec(
        num_experts=num_groups * group_size,
        top_k=top_k,
        num_groups=num_groups,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        weighting=draw(st.sampled_from(["probability", "renormalised", "renormalised_in_group"])),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_null_experts=num_groups * draw(st.integers(0, 2)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 3.0, 100.0]))
    logits = torch.randn(9, spec.num_columns, generator=generator) * spread
    bias = torch.randn(spec.num_columns, generator=generator) if draw(st.booleans()) else None
    scale = torch.rand(spec.num_experts, generator=generator) + 0.5 if draw(st.booleans()) else None
    return spec, logits, bias, scale


def test_golden_vector():
    """Pangu Pro's router: softmax over all, best of each group, scaled, not renormalised."""
    logits = torch.tensor([[0.1, 0.5, -0.2, 0.9, 1.2, 1.1, -1.0, -0.4]])
    scale = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.05])
    spec = RouterSpec(num_experts=8, top_k=4, num_groups=4)
    unscaled, scaled = route(logits, spec), route(logits, spec, scale=scale[None])
    assert scaled.ids.tolist() == [[1, 3, 4, 7]]
    expected = torch.tensor([[0.123088, 0.183625, 0.247868, 0.050044]])
    torch.testing.assert_close(unscaled.weights, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[0.135396, 0.183625, 0.297441, 0.052546]])
    torch.testing.assert_close(scaled.weights, expected, rtol=0, atol=1e-6)
    plain = route(logits, dataclasses.replace(spec, num_groups=1))
    assert plain.ids.tolist() == [[4, 5, 3, 1]]


@given(routers())
def test_invariants(router):
    spec, logits, bias, scale = router
    ids, weights, scores = route(logits, spec, bias=bias, scale=scale)
    num_tokens, num_experts = len(logits), spec.num_experts
    assert ids.shape == weights.shape == (num_tokens, spec.top_k)
    assert (ids.dtype, weights.dtype, scores.dtype) == (torch.int64, torch.float32, torch.float32)
    assert scores.shape == (num_tokens, num_experts)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    is_null = ids == num_experts
    assert ((ids >= 0) & (ids <= num_experts)).all()
    assert (weights[is_null] == 0).all()
    if spec.weighting == "probability" and logits.abs().max() < 50:
        assert (weights[~is_null] > 0).all()
    for row in ids.tolist():
        true = [pick for pick in row if pick < num_experts]
        assert len(set(true)) == len(true)
    # Slots of one group stand together, and each group has the same number of them.
    group_of_slot = torch.arange(spec.num_groups).repeat_interleave(spec.picks_per_group)
    group_of_pick = ids // (num_experts // spec.num_groups)
    assert (is_null | (group_of_pick == group_of_slot)).all()


@given(routers())
def test_weights_are_the_formula(router):
    spec, logits, _, scale = router
    ids, weights, scores = route(logits.double(), spec, scale=scale)
    picked = torch.nn.functional.pad(scores, (0, 1)).gather(1, ids)
    if spec.weighting != "probability":
        num_pools = spec.num_groups if spec.weighting == "renormalised_in_group" else 1
        pools = picked.unflatten(1, (num_pools, -1))
        picked = (pools / pools.sum(2, keepdim=True).clamp(min=1e-300)).flatten(1)
    if scale is not None:
        picked = picked * torch.nn.functional.pad(scale.double(), (0, 1))[ids]
    torch.testing.assert_close(weights, picked * spec.scaling_factor, rtol=1e-9, atol=1e-12)


@given(routers())
def test_permuting_experts_inside_groups_permutes_the_picks(router):
    spec, logits, _, _ = router
    if spec.num_null_experts:
        return
    place = torch.randperm(spec.num_experts // spec.num_groups)
    starts = torch.arange(0, spec.num_experts, len(place))[:, None]
    old_of_new = (starts + place).flatten()
    before, after = route(logits, spec), route(logits[:, old_of_new], spec)
    if logits.abs().max() > 50:  # far apart logits saturate, and ties go to the lowest id
        return
    assert torch.equal(old_of_new[after.ids], before.ids)
    torch.testing.assert_close(after.weights, before.weights)


@pytest.mark.parametrize("picks", [1, 2])
def test_ties_go_to_the_lowest_id(picks):
    spec = RouterSpec(num_experts=64, top_k=2 * picks, num_groups=2, num_null_experts=2)
    ids = route(torch.zeros(5, 66), spec).ids
    assert ids.tolist() == [[*range(picks), *range(32, 32 + picks)]] * 5


def test_one_pick_a_group_weighs_exactly_one_even_where_its_score_is_zero():
    spec = RouterSpec(8, 4, num_groups=4, weighting="renormalised_in_group")
    logits = torch.tensor([[300.0, 0, -1, -2, -3, -4, -400, -500]])
    assert route(logits, spec).scores[0, 3] == 0
    assert route(logits, spec).weights.tolist() == [[1.0] * 4]
    watched = route(logits.requires_grad_(), spec).weights
    assert watched.tolist() == [[1.0] * 4]
    watched.square().sum().backward()
    assert logits.grad.tolist() == [[0.0] * 8]


@pytest.mark.parametrize("weighting", ["probability", "renormalised", "renormalised_in_group"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_carry_the_exact_gradient(score, weighting):
    spec = RouterSpec(12, 6, 3, score=score, weighting=weighting, num_null_experts=3)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 15, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(12, generator=generator, dtype=torch.float64, requires_grad=True)
    assert (route(logits, spec).ids == 12).any()
    torch.autograd.gradcheck(lambda x, s: route(x, spec, scale=s).weights, (logits, scale))


def test_token_without_a_true_pick_gets_weight_zero_and_no_gradient():
    logits = torch.tensor([[0.0, 0.0, 9.0, 9.0]], requires_grad=True)
    for weighting in ("probability", "renormalised", "renormalised_in_group"):
        spec = RouterSpec(2, 2, weighting=weighting, num_null_experts=2)
        routing = route(logits, spec)
        assert routing.ids.tolist() == [[2, 2]]
        assert routing.weights.tolist() == [[0.0, 0.0]]
        (grad,) = torch.autograd.grad(routing.weights.sum(), logits)
        assert grad.tolist() == [[0.0] * 4]


def test_bias_selects_but_does_not_weigh():
    spec = RouterSpec(4, 1, score="sigmoid")
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = route(logits, spec, bias=torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert routing.ids.tolist() == [[3]]
    torch.testing.assert_close(routing.weights, logits[:, 3:].sigmoid())


def test_equals_qwen3_moe_router():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    for norm in (False, True):
        config = Qwen3MoeConfig(
            hidden_size=8, num_experts=16, num_experts_per_tok=4, norm_topk_prob=norm
        )
        theirs = Qwen3MoeTopKRouter(config)
        torch.nn.init.normal_(theirs.weight)
        logits, weights, ids = theirs(torch.randn(33, 8))
        spec = RouterSpec(16, 4, weighting="renormalised" if norm else "probability")
        ours = route(logits, spec)
        assert torch.equal(ours.ids, ids)
        torch.testing.assert_close(ours.weights, weights, rtol=1e-6, atol=1e-7)


def test_equals_deepseek_v3_router():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=8, n_routed_experts=32, num_experts_per_tok=4, n_group=8, topk_group=3
    )
    theirs = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_(std=0.3)
    x = torch.randn(65, 8)
    logits, weights, ids = theirs(x)
    spec = RouterSpec(
        32, 4, 8, "sigmoid", "renormalised", scaling_factor=theirs.routed_scaling_factor,
        limit_groups=3,
    )  # fmt: skip
    ours = route(logits, spec, bias=theirs.e_score_correction_bias)
    order, their_order = ours.ids.sort(1), ids.sort(1)
    assert torch.equal(order.values, their_order.values)
    torch.testing.assert_close(
        ours.weights.gather(1, order.indices), weights.gather(1, their_order.indices)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype):
    logits = torch.randn(7, 16).to(dtype)
    spec = RouterSpec(16, 4, 4)
    torch.testing.assert_close(route(logits, spec).weights, route(logits.float(), spec).weights)
    assert route(logits, spec).weights.dtype == torch.float32


def test_no_tokens():
    routing = route(torch.zeros(0, 8), RouterSpec(8, 4, 4))
    assert routing.ids.shape == routing.weights.shape == (0, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 10}, "num_experts=10 is not a multiple of num_groups=4"),
        ({"top_k": 6}, "top_k=6 is not a multiple of num_groups=4"),
        ({"top_k": 12}, "top_k=12 is more than the 8 experts"),
        ({"num_null_experts": 3}, "num_null_experts=3 is not a multiple"),
        ({"num_groups": 0}, "num_groups=0 must be at least 1"),
        ({"score": "relu"}, "score='relu' is unknown"),
        ({"weighting": "none"}, "weighting='none' is unknown"),
        ({"limit_groups": 5}, r"limit_groups=5 is not in 1\.\.num_groups=4"),
        ({"limit_groups": 2, "top_k": 6}, "top_k=6 is more than the 4 experts"),
        ({"limit_groups": 2, "num_null_experts": 4}, "no fixed picks in a group"),
    ],
)
def test_impossible_rules(values, words):
    with pytest.raises(ConfigError, match=words):
        RouterSpec(**({"num_experts": 8, "top_k": 4, "num_groups": 4} | values))


def test_misshaped_inputs_and_unknown_backend():
    spec = RouterSpec(8, 4, 4)
    with pytest.raises(ConfigError, match=r"router logits \(3, 9\) are not \[T, 8\]"):
        route(torch.zeros(3, 9), spec)
    with pytest.raises(ConfigError, match=r"selection bias \(4,\) is not \[8\]"):
        route(torch.zeros(3, 8), spec, bias=torch.zeros(4))
    with pytest.raises(ConfigError, match=r"router scale \(4,\) is not \[8\]"):
        route(torch.zeros(3, 8), spec, scale=torch.zeros(4))
    with pytest.raises(BackendError, match="route has no backend 'fast'"):
        route(torch.zeros(3, 8), spec, backend="fast")
    assert "reference" in ROUTE.names()
