"""Layouts that cannot be are refused, and the message names those that can."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mogul.core.errors import BackendError, ConfigError
from mogul.parallel import Plan, contiguous, make_dispatcher, placed
from mogul.parallel.groups import make_groups
from mogul.parallel.shard import spread_experts
from mogul.parallel.slices import cut_experts
from mogul.spec import presets
from mogul.spec.families import model_spec
from mogul.spec.grouping import Grouping
from mogul.spec.parallel import PRESETS, Parallel, h2p


def plan(ep: int, groups: int, **more) -> Plan:
    group = SimpleNamespace(size=lambda: ep, rank=lambda: 0)
    grouping = Grouping(num_experts=16, num_groups=groups, top_k=8)
    return Plan(group=group, owners=contiguous(16, ep), grouping=grouping, **more)


def test_static_names_the_legal_numbers_of_ranks():
    with pytest.raises(BackendError, match="ep=16 does not divide the router's 8 groups") as caught:
        make_dispatcher("static", plan(16, 8))
    assert "legal is ep = 1, 2, 4, 8" in str(caught.value)
    assert "'all_to_all'" in caught.value.__notes__[0]


def test_an_ungrouped_router_is_never_static():
    with pytest.raises(BackendError, match="the router's 1 groups; legal is ep = 1"):
        make_dispatcher("static", plan(2, 1))


def test_auto_takes_static_where_legal_and_says_where_not(caplog):
    assert type(make_dispatcher("auto", plan(4, 8))).__name__ == "Static"
    with caplog.at_level("WARNING"):
        assert type(make_dispatcher("auto", plan(4, 2))).__name__ == "AllToAll"
    assert "ep=4 does not divide the router's 2 groups; legal is ep = 1, 2" in caplog.text


def test_an_unknown_dispatch_names_the_known():
    with pytest.raises(BackendError, match="no backend 'statik'") as caught:
        make_dispatcher("statik", plan(2, 8))
    assert "static" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("name", "options", "unread"),
    [
        ("static", {"capacity": 1.0}, "capacity"),
        ("auto", {"capacity": 1.0}, "capacity"),
        ("gather", {"capacity": 1.0, "levels": (None, None)}, "capacity and node_ranks"),
        ("all_to_all", {"levels": (None, None)}, "node_ranks"),
    ],
)
def test_an_option_that_is_not_read_is_refused(name, options, unread):
    with pytest.raises(ConfigError, match=f"does not read {unread}\n"):
        make_dispatcher(name, plan(4, 8, **options))


def test_a_cut_that_does_not_divide_the_expert_width_is_refused():
    experts = SimpleNamespace(
        num_experts=4, has_gate=True, is_transposed=False, down_proj=torch.ones(4, 8, 10)
    )
    with pytest.raises(ConfigError, match="moe_tp=4 does not divide the expert width 10") as caught:
        cut_experts(experts, [0, 1], 0, 4)
    assert "(1, 2, 5, 10)" in caught.value.__notes__[0]


def test_experts_must_be_shared_equally():
    with pytest.raises(ConfigError, match="16 experts cannot be shared equally by ep=3") as caught:
        contiguous(16, 3)
    assert "(1, 2, 4, 8, 16)" in caught.value.__notes__[0]


def test_a_placement_for_other_devices_is_refused():
    import numpy as np

    with pytest.raises(ConfigError, match="for 2 devices, the layout has ep=4"):
        placed(np.arange(8).reshape(2, 4), 8, 4)


def test_a_dense_model_has_no_experts_to_spread():
    from torch import nn

    with pytest.raises(ConfigError, match="has no stacked experts"):
        spread_experts(nn.Linear(2, 2), None)  # type: ignore[arg-type]


PANGU = model_spec(presets.config("pangu-pro-moe-72b"))


def test_the_hybrid_layout_of_the_paper_is_legal_for_its_model():
    assert h2p(8) == PRESETS["h2p"]
    for devices in (2, 4, 8):
        h2p(devices).check_runs(PANGU, "static")
    with pytest.raises(ConfigError, match="no form for 6 devices"):
        h2p(6)


@pytest.mark.parametrize(
    ("layout", "says", "fix"),
    [
        (Parallel(tp=5), "does not divide the 8 key-value heads", "(1, 2, 4, 8)"),
        (Parallel(pp=2), "no pipeline stages", "pp=1"),
        (Parallel(tp=2, dp=4, shared_tp=4), "neither 1, tp nor all", "(1, 2, 8)"),
        (Parallel(dp=16, ep=16), "16 devices cannot hold whole groups of 8", "1, 2, 4 or 8"),
        (Parallel(dp=5, ep=1, moe_tp=5), "does not divide the expert width 1344", "(1, 2, 3, 4"),
    ],
)
def test_illegal_layouts_name_the_legal(layout, says, fix):
    with pytest.raises(ConfigError, match=says) as caught:
        layout.check_runs(PANGU, "static")
    assert fix in caught.value.__notes__[0]


def test_a_layout_needs_its_number_of_ranks(monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="needs 2 ranks, there are 3"):
        make_groups(Parallel(dp=2))
