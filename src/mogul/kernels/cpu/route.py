"""The commonest routing of one process, in as few operators as it takes.

With one pick a group whose weight is 1 (upcycled models), a token of decode spends more time on
routing's small operators than on its arithmetic: each runs cold, right after an expert's weights
went through the caches. The rule is `reference/route.py`'s; this returns the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.kernels.router_spec import RouterSpec

_first: dict[tuple[int, int], Tensor] = {}
"""The first expert of every group, by (experts, groups)."""


def route_one_each(logits_TE: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, M], weights 1 and scores [T, E] of `spec.picks_one_each` without bias and scale."""
    shape = (spec.num_experts, spec.num_groups)
    if (first_M := _first.get(shape)) is None:
        with torch.inference_mode(False):
            first_M = torch.arange(0, shape[0], shape[0] // shape[1], device="cpu")
        _first[shape] = first_M
    score_TE = logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()
    place_TM = score_TE.view(-1, shape[1], shape[0] // shape[1]).argmax(-1)
    return place_TM.add_(first_M), torch.ones_like(place_TM, dtype=score_TE.dtype), score_TE


def takes_one_each(logits: Tensor, spec: RouterSpec) -> bool:
    """Whether a call without bias and scale may take this way."""
    return (
        spec.picks_one_each
        and logits.dtype is torch.float32
        and type(logits) is Tensor  # no stand-in of a tracer
        and not logits.requires_grad
        and not torch.compiler.is_compiling()
    )
