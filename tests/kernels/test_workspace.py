"""Buffers kept between calls must never show."""

import threading

import torch

from mogul.kernels import ExpertLayout, moe_forward
from mogul.kernels.cpu import workspace
from mogul.kernels.cpu.workspace import matrices

TOKENS, HIDDEN, WIDTH, EXPERTS, PICKS = 300, 16, 8, 8, 4  # more rows than one chunk


def case(seed, tokens=TOKENS):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, HIDDEN, generator=rng),
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=rng),
        torch.randn(EXPERTS, HIDDEN, WIDTH, generator=rng),
        torch.randint(0, EXPERTS, (tokens, PICKS), generator=rng),
        torch.rand(tokens, PICKS, generator=rng),
    )


def test_a_later_call_leaves_earlier_results_alone():
    first = moe_forward(*case(0), backend="cpu")
    kept = first.clone()
    moe_forward(*case(1), backend="cpu")
    moe_forward(*case(2, tokens=2 * TOKENS), backend="cpu")
    assert torch.equal(first, kept)
    assert torch.equal(moe_forward(*case(0), backend="cpu"), kept)


def test_training_works_after_inference_mode():
    with torch.inference_mode():
        want = moe_forward(*case(0), backend="cpu")
    x, *rest = case(0)
    got = moe_forward(x.requires_grad_(), *rest, backend="cpu")
    got.sum().backward()
    torch.testing.assert_close(got, want.clone(), rtol=1e-5, atol=1e-5)


def test_every_thread_has_buffers_of_its_own():
    want = [moe_forward(*case(seed), backend="cpu") for seed in range(4)]
    wrong = []

    def run(seed):
        results = (moe_forward(*case(seed), backend="cpu") for _ in range(20))
        wrong.extend(seed for result in results if not torch.equal(result, want[seed]))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_large_request_is_not_kept(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_KEPT_BYTES", 64)
    made = workspace.Workspace()
    like = torch.empty(0)
    assert made.take("x", (4, 4), like).data_ptr() == made.take("x", (4, 4), like).data_ptr()
    assert made.take("x", (5, 4), like) is not made.take("x", (5, 4), like)
    assert [tensor.numel() for tensor in made._kept.values()] == [16]


def test_matrices_follow_their_weight():
    """The kept views are those of the weight as it is now: replaced data gives new views."""
    weight = torch.nn.Parameter(torch.randn(3, 4, 2))
    kept = matrices(weight, ExpertLayout())
    assert matrices(weight, ExpertLayout()) is kept
    with torch.no_grad():
        weight[1] += 1.0
    assert all(torch.equal(a, b) for a, b in zip(kept, weight, strict=True))
    weight.data = torch.randn(3, 4, 2)
    renewed = matrices(weight, ExpertLayout())
    assert all(torch.equal(a, b) for a, b in zip(renewed, weight, strict=True))
    turned = torch.randn(3, 2, 4)
    views = matrices(turned, ExpertLayout(is_transposed=True))
    assert all(torch.equal(a, b.T) for a, b in zip(views, turned, strict=True))


def test_matrices_follow_a_weight_that_is_read_another_way_where_it_lies():
    weight, layout = torch.randn(3, 4, 4, dtype=torch.float16), ExpertLayout()
    for change in (lambda data: data.mT, lambda data: data.view(torch.bfloat16)):
        matrices(weight, layout)
        weight.data = change(weight.data)
        again = matrices(weight, layout)
        assert all(torch.equal(a, b) for a, b in zip(again, weight, strict=True))
        assert again[0].dtype == weight.dtype


def test_views_of_a_weight_that_moved_do_not_keep_its_memory():
    moved, other = torch.randn(EXPERTS, 4, 6), torch.randn(EXPERTS, 4, 6)
    layout = ExpertLayout()
    matrices(moved, layout)
    assert id(moved) in workspace._matrices
    moved.data = torch.randn(EXPERTS, 4, 6)  # as a module's `to(device)` does
    matrices(other, layout)
    assert id(moved) not in workspace._matrices
    assert id(other) in workspace._matrices
    assert torch.equal(matrices(moved, layout)[2], moved[2])
