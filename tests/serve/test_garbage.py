"""What an engine on an accelerator finds when it is ready is not collected while it runs."""

from __future__ import annotations

import gc

import pytest
import torch

from mogul.serve.garbage import set_aside

DEVICE = torch.device("cuda")


class Owner:
    """Something that can be weakly referred to."""


@pytest.fixture(autouse=True)
def nothing_stays_aside():
    yield
    gc.unfreeze()


def test_objects_are_set_aside_and_given_back():
    kept, owner = [[] for _ in range(1000)], Owner()
    collect_again = set_aside(DEVICE, owner)
    assert gc.get_freeze_count() > len(kept)
    after = [[] for _ in range(10)]
    looked_at = {id(one) for one in gc.get_objects()}
    assert all(id(one) in looked_at for one in after)
    assert not any(id(one) in looked_at for one in kept)
    collect_again()
    assert gc.get_freeze_count() == 0


def test_a_processor_keeps_pythons_own_ways():
    gc.freeze()  # the user's own
    set_aside(torch.device("cpu"), Owner())()
    assert gc.get_freeze_count() > 0


def test_an_engine_that_nobody_closes_gives_back_too():
    owner, other = Owner(), Owner()
    set_aside(DEVICE, owner)
    set_aside(DEVICE, other)
    assert gc.get_freeze_count() > 0
    del owner
    assert gc.get_freeze_count() == 0, "what it leaves must go, whoever else decodes"


def test_one_that_was_closed_changes_nothing_for_the_next():
    first, second = Owner(), Owner()
    close = set_aside(DEVICE, first)
    close()
    set_aside(DEVICE, second)
    del first
    close()
    assert gc.get_freeze_count() > 0
