"""The balance loss against its formula in NumPy, and its fixed points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mogul.models.balance_loss import balance_loss, z_loss


def random_layers(num_layers=2, tokens=12, experts=8, picks=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(tokens, experts, generator=generator) for _ in range(num_layers)]
    groups = picks
    ids = [
        x.unflatten(-1, (groups, -1)).argmax(-1) + torch.arange(groups) * (experts // groups)
        for x in logits
    ]
    return logits, ids


def by_formula(logits, ids, keep, score="softmax"):
    x = np.exp(logits) if score == "softmax" else 1 / (1 + np.exp(-logits))
    p = (x / x.sum(1, keepdims=True))[keep].mean(0)
    num_experts, picks = logits.shape[1], ids.shape[1]
    count = np.array([(ids[keep] == i).sum() for i in range(num_experts)])
    return (num_experts / (picks * keep.sum()) * count * p).sum()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_formula(score, padded):
    logits, ids = random_layers()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]) if padded else None
    keep = mask.flatten().bool().numpy() if padded else np.ones(12, bool)
    expected = np.mean(
        [by_formula(x.numpy(), i.numpy(), keep, score) for x, i in zip(logits, ids, strict=True)]
    )
    given = balance_loss(logits, ids, num_experts=8, score=score, attention_mask=mask)
    assert given.item() == pytest.approx(expected, rel=1e-5)


def test_one_when_all_experts_are_used_alike():
    ids = torch.tensor([[0, 2], [1, 3]])
    assert balance_loss([torch.zeros(2, 4)], [ids], num_experts=4).item() == pytest.approx(1)


def test_experts_over_picks_at_collapse():
    logits = torch.tensor([[50.0, -50, 50, -50]]).repeat(5, 1)
    ids = torch.tensor([[0, 2]]).repeat(5, 1)
    assert balance_loss([logits], [ids], num_experts=4).item() == pytest.approx(4 / 2)


def test_gradient_lowers_the_crowded_expert():
    logits = torch.zeros(4, 4, requires_grad=True)
    ids = torch.tensor([[0], [0], [0], [1]])
    balance_loss([logits], [ids], num_experts=4).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2] < 0).all()


def test_null_picks_and_null_logits_do_not_count():
    logits, ids = random_layers(1)
    with_null = torch.cat((logits[0], torch.full((12, 2), -1e9)), 1)
    expected = balance_loss(logits, ids, num_experts=8)
    torch.testing.assert_close(balance_loss([with_null], ids, num_experts=8), expected)
    some = ids[0].clone()
    some[:, 3] = 8
    fewer = balance_loss(logits, [some], num_experts=8)
    assert fewer < expected


def test_a_longer_mask_of_a_cached_step_is_cut():
    logits, ids = random_layers(1, tokens=2)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    given = balance_loss(logits, ids, num_experts=8, attention_mask=mask)
    only = balance_loss([logits[0][1:]], [ids[0][1:]], num_experts=8)
    torch.testing.assert_close(given, only)


def test_z_loss_equals_the_formula():
    logits, _ = random_layers()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = np.mean([np.log(np.exp(x.numpy()[1:]).sum(1)) ** 2 for x in logits])
    assert z_loss(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        balance_loss([], [], num_experts=8)
    logits, ids = random_layers()
    with pytest.raises(ValueError, match=r"shape \(2, 1, 6, 6\) does not say"):
        balance_loss(logits, ids, num_experts=8, attention_mask=torch.ones(2, 1, 6, 6))
