"""What a run chooses for all its passes: kernels and precision."""

from __future__ import annotations

import torch
from torch.nn import functional

from mogul.train.session import Session


def test_layers_computed_again_use_the_kernels_of_the_first_pass(recipe, tmp_path, monkeypatch):
    """Else the backward pass would unpack what another attention kernel saved."""
    real, seen = functional.scaled_dot_product_attention, []

    def recording(*args, **kwargs):
        seen.append(torch._C._get_sdp_priority_order())
        return real(*args, **kwargs)

    before = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(functional, "scaled_dot_product_attention", recording)
    changes = {"run__attention": "cudnn", "run__activation_checkpointing": True}
    with Session(recipe(**changes, run__compile=False), tmp_path) as session:
        session.take_step()
    assert len(seen) == 4  # two layers, forward and again
    assert all(order == seen[0] != before for order in seen)
    assert torch._C._get_sdp_priority_order() == before
