"""The table of owners: replicas take turns, empty slots take none, null picks go nowhere."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mogul.parallel import Plan, contiguous, make_dispatcher, placed
from mogul.spec.grouping import Grouping


def route(owners, ids):
    group = SimpleNamespace(size=lambda: owners.ep * owners.moe_tp, rank=lambda: 0)
    grouping = Grouping(num_experts=owners.num_experts, top_k=1)
    plan = Plan(group=group, owners=owners, grouping=grouping)  # type: ignore[arg-type]
    return make_dispatcher("all_to_all", plan)._route(torch.tensor(ids))  # type: ignore[attr-defined]


def test_replicas_share_the_picks_by_token_number():
    owners = placed(np.array([[0, 1], [2, 1], [3, 1]]), 4, 3)
    assert owners.has_replicas
    found = route(owners, [[1], [1], [1], [1], [0], [4]])
    assert found.wanted.int().argmax(0).tolist()[:4] == [0, 1, 2, 0]
    assert found.slots.flatten().tolist() == [1, 1, 1, 1, 0, 2]
    assert not found.wanted[:, 5].any()


def test_slices_of_an_expert_are_all_wanted():
    found = route(contiguous(4, 2, moe_tp=2), [[0], [3]])
    assert found.wanted.T.tolist() == [[True, True, False, False], [False, False, True, True]]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.sampled_from([1, 2, 4, 8]))
def test_every_expert_is_found_where_the_placement_says(order, ep):
    owners = placed(np.array(order).reshape(ep, -1), 8, ep)
    rank, slot, count = owners.tables("cpu")
    for expert in range(8):
        assert owners.experts_of_rank[int(rank[0, expert])][int(slot[0, expert])] == expert
        assert int(count[expert]) == 1
    assert owners.is_contiguous == (list(order) == list(range(8)))
    assert (int(rank[0, 8]), int(slot[0, 8])) == (ep, owners.slots)
