"""Experts in steps, ranks one after another in Triton's interpreter; run by test_steps.py."""

import torch

from mogul.kernels import ExpertLayout
from mogul.kernels.reference.moe import moe_forward_reference
from mogul.kernels.triton import steps
from mogul.parallel.window import Region, Window

RANKS, TOKENS, WIDTH, INNER, EXPERTS, PICKS = 2, 5, 32, 16, 8, 4


def layer(tokens: int, columns_of_rank: bool, with_more: bool) -> float:
    """Largest error of the sums that arrive at their ranks."""
    torch.manual_seed(tokens)
    rows, share = RANKS * tokens, EXPERTS // RANKS
    x = torch.randn(rows, WIDTH).half()
    gate_up = (torch.randn(EXPERTS, 2 * INNER, WIDTH) * 0.1).half()
    down = (torch.randn(EXPERTS, WIDTH, INNER) * 0.1).half()
    group = torch.arange(PICKS) * (EXPERTS // PICKS)
    ids = torch.randint(0, EXPERTS // PICKS, (rows, PICKS)) + group
    ids[0, 1] = EXPERTS  # no pick
    weights, more = torch.rand(PICKS, rows).T, torch.randn(RANKS, WIDTH, rows).half().mT
    own_words = [torch.full((rows * WIDTH // 2,), -1, dtype=torch.int32) for _ in range(RANKS)]
    addresses = torch.tensor([one.data_ptr() for one in own_words])
    owns, wanted = [], torch.zeros(rows, WIDTH)
    for rank in range(RANKS):
        part = slice(rank * share, (rank + 1) * share)
        mine, last = gate_up[part].contiguous(), down[part].contiguous()
        first = rank * PICKS // RANKS
        columns = slice(first, first + PICKS // RANKS) if columns_of_rank else slice(None)
        picks = steps.take(ids, weights, columns, rank * share, mine)
        extra = more[rank] if with_more else None
        own = torch.empty(tokens, WIDTH, dtype=torch.float16)
        local = ids - rank * share
        local = torch.where((local < 0) | (local >= share), share, local)
        options = {"gate_up_bias": None, "down_bias": None, "layout": ExpertLayout()}
        args = (x.float(), mine.float(), last.float(), local, weights)
        alone = moe_forward_reference(*args, **options)
        wanted += alone if extra is None else alone + extra.float()
        if picks.sort is None:
            y = steps.few(picks, x, mine, last).float()
            assert (y - alone).abs().max() < 5e-3
            continue
        y = steps.products(picks, x, mine, last)
        steps.push(picks, y, extra, addresses, own, rank)
        owns.append(own)
    worst = 0.0
    for rank, own in enumerate(owns):
        arrived = own_words[rank].view(torch.float16).view(RANKS, tokens, WIDTH)
        region = Region(own_words[rank], [], None, addresses)
        given = Window(rank, RANKS)._sum(region, own, arrived).float()
        worst = max(worst, float((given - wanted.view(RANKS, tokens, WIDTH)[rank]).abs().max()))
    return worst


if __name__ == "__main__":
    for flag in (True, False):  # static with a shared expert; gathered without
        error = layer(TOKENS, columns_of_rank=flag, with_more=flag)
        assert 0 < error < 5e-3, (flag, error)
    assert layer(1, columns_of_rank=True, with_more=False) < 5e-3
    print("stepped")
