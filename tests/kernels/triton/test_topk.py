"""The pick of the few largest, in Triton's interpreter, against torch."""

from __future__ import annotations

import pytest
from scripts import printed_by

SCRIPT = """
import torch
from mogul.kernels.triton import topk as module
from mogul.kernels.triton.topk import softmax_topk, topk

torch.manual_seed(0)
rows = torch.randn(9, 128).half()
few = softmax_topk(rows, 8, True, torch.float32)
module.ranked_rows = 8  # so many rows take one search a pick
many = softmax_topk(rows, 8, True, torch.float32)
assert torch.equal(few[1], many[1]) and torch.allclose(few[0], many[0], atol=1e-6)
assert torch.equal(topk(rows, 8)[1], rows.topk(8, -1).indices)
module.ranked_rows = 512
for columns, k in ((128, 8), (60, 4), (7, 7), (5, 1)):
    for dtype in (torch.float32, torch.float16):
        rows = torch.randn(9, columns).to(dtype)
        values, ids = topk(rows, k)
        want = rows.topk(k, -1)
        assert torch.equal(values, want.values), (columns, k)
        assert torch.equal(rows.gather(1, ids), values)
assert topk(torch.zeros(2, 16), 3)[1].tolist() == [[0, 1, 2]] * 2, "ties go to the left"
few = torch.full((1, 8), -torch.inf)
few[0, 3] = 1.0
values, ids = topk(few, 4)
assert ids[0, 0] == 3 and len(set(ids[0].tolist())) == 4, "no column twice"
assert values[0, 1] == -torch.inf
assert len(set(topk(torch.full((1, 8), torch.nan), 4)[1][0].tolist())) == 4
assert topk(torch.zeros(0, 8), 2)[0].shape == (0, 2)
print("topk is right")
"""


def test_largest_of_short_rows():
    pytest.importorskip("triton")
    assert "topk is right" in printed_by(SCRIPT)
