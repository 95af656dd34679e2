"""The short way of routing gives what the reference gives, and is taken only where it may."""

import pytest
import torch

from mogul.kernels import RouterSpec, route
from mogul.kernels.cpu.route import takes_one_each

RULE = {"num_experts": 12, "top_k": 4, "num_groups": 4, "weighting": "renormalised_in_group"}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_equal_to_the_reference(score, tokens):
    spec = RouterSpec(**RULE, score=score)
    rng = torch.Generator().manual_seed(tokens)
    logits = torch.randint(-2, 3, (tokens, 12), generator=rng).float()  # ties in most groups
    assert takes_one_each(logits, spec)
    got, want = route(logits, spec), route(logits, spec, backend="reference")
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_every_call_has_tensors_of_its_own():
    spec = RouterSpec(**RULE)
    first = route(torch.zeros(2, 12), spec)
    first.ids.add_(1)
    first.weights.mul_(3)
    again = route(torch.zeros(2, 12), spec)
    assert again.ids.tolist() == [[0, 3, 6, 9]] * 2
    assert again.weights.tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 8},
        {"weighting": "renormalised"},
        {"scaling_factor": 2.0},
        {"num_null_experts": 4},
    ],
)
def test_other_rules_go_the_long_way(change):
    spec = RouterSpec(**{**RULE, **change})
    assert not takes_one_each(torch.zeros(1, spec.num_columns), spec)


def test_defaults_of_torch_change_nothing():
    spec = RouterSpec(20, 5, 5, weighting="renormalised_in_group")
    logits = torch.randn(3, 20)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = route(logits, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(got, route(logits, spec, backend="reference"), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_gradient_goes_the_long_way():
    assert not takes_one_each(torch.zeros(1, 12, requires_grad=True), RouterSpec(**RULE))
