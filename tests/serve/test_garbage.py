"""What an engine on an accelerator finds when it is ready is not collected while it runs."""

from __future__ import annotations

import gc

import torch

from mogul.serve.garbage import collect_again, set_aside


class Owner:
    """Something that can be weakly referred to."""


def test_objects_are_set_aside_and_given_back():
    device, owner = torch.device("cuda"), Owner()
    kept = [[] for _ in range(1000)]
    set_aside(device, owner)
    try:
        assert gc.get_freeze_count() > len(kept)
        after = [[] for _ in range(10)]
        looked_at = {id(one) for one in gc.get_objects()}
        assert all(id(one) in looked_at for one in after)
        assert not any(id(one) in looked_at for one in kept)
    finally:
        collect_again(device)
    assert gc.get_freeze_count() == 0


def test_a_processor_keeps_pythons_own_ways():
    set_aside(torch.device("cpu"), Owner())
    assert gc.get_freeze_count() == 0


def test_an_engine_that_nobody_closes_gives_back_too():
    owner, other = Owner(), Owner()
    set_aside(torch.device("cuda"), owner)
    set_aside(torch.device("cuda"), other)
    try:
        assert gc.get_freeze_count() > 0
        del owner
        assert gc.get_freeze_count() == 0, "what it leaves must go, whoever else decodes"
    finally:
        collect_again(torch.device("cuda"))
