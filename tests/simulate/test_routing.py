import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogul.core.errors import ArtifactError, ConfigError
from mogul.simulate.routing import Routing, layer_loads
from mogul.spec import balance
from mogul.spec.grouping import Grouping
from mogul.spec.placement import LayerPlacement, Placement
from mogul.spec.trace import ModelStamp, Trace, TraceMeta

MOGE = Grouping(num_experts=64, num_groups=8, top_k=8)
FREE = Grouping(num_experts=64, num_groups=1, top_k=8)


def load(grouping, tokens, ranks, **routing):
    return layer_loads(Routing(**routing), grouping, tokens, ranks, 1)[0][1]


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 600), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_whole_groups_get_exactly_their_share(ranks, tokens, alpha):
    one = load(MOGE, tokens, ranks, kind="power_law", alpha=alpha)
    assert one.is_exact
    assert one.rho == pytest.approx(1.0)
    assert one.max_rows == pytest.approx(tokens * 8 / ranks)


@pytest.mark.parametrize(
    ("grouping", "ranks", "tokens", "expected"),
    [  # Monte-Carlo of the fact sheet: rho with uniform popularity
        (FREE, 8, 8, 1.54), (FREE, 8, 32, 1.22), (FREE, 8, 128, 1.12), (FREE, 8, 512, 1.06),
        (Grouping(num_experts=256, top_k=8), 32, 32, 1.75),
        (Grouping(num_experts=256, top_k=8), 64, 512, 1.31),
        (MOGE, 16, 32, 1.31), (MOGE, 64, 128, 1.58),
    ],
)  # fmt: skip
def test_rho_of_noise_alone(grouping, ranks, tokens, expected):
    assert load(grouping, tokens, ranks).rho == pytest.approx(expected, rel=0.06)


def test_distinct_experts_agree_with_drawn_picks():
    rng = np.random.default_rng(1)
    device = np.arange(64) // 8
    drawn = [
        balance.distinct_per_device(balance.random_picks(MOGE, 8, rng), device, 8)
        for _ in range(400)
    ]
    one = load(MOGE, 8, 8)
    assert one.distinct_D.sum() == pytest.approx(np.sum(drawn, axis=1).mean(), rel=0.01)
    assert one.delta == pytest.approx(np.mean([balance.delta(d) for d in drawn]), rel=0.05)


def test_ranks_a_token_reaches():
    assert load(FREE, 4, 8).ranks_per_token == pytest.approx(5.43, abs=0.01)
    assert load(Grouping(num_experts=256, top_k=8), 4, 32).ranks_per_token == pytest.approx(
        7.27, abs=0.01
    )
    assert load(MOGE, 4, 8).ranks_per_token == pytest.approx(8)
    assert load(MOGE, 4, 4).ranks_per_token == pytest.approx(4)


def test_skew_touches_fewer_experts_and_loads_one_rank_more():
    even, skewed = load(FREE, 16, 8), load(FREE, 16, 8, kind="power_law", alpha=1.0)
    assert skewed.distinct_D.sum() < even.distinct_D.sum()
    assert skewed.rho > even.rho


def test_a_trace_gives_every_layer_its_own_load(tmp_path):
    counts = np.ones((2, 64))
    counts[1, :8] = 20
    np.savez(tmp_path / "t.npz", load=counts)
    routing = Routing(kind="trace", file=str(tmp_path / "t.npz"))
    (_, first), (_, second) = layer_loads(routing, FREE, 4096, 8, 2)
    assert first.rho < 1.1
    assert second.rho > 2
    with pytest.raises(ConfigError, match="loads of 2 layers x 64 experts"):
        layer_loads(routing, FREE, 16, 8, 3)


def stamp(experts=64, layers=2):
    return ModelStamp(
        name="toy", family="qwen3_moe", num_layers=layers, num_experts=experts, top_k=8,
        hidden_size=64,
    )  # fmt: skip


def test_a_trace_folder_is_read(tmp_path):
    counts = np.ones((2, 64), dtype=np.int64)
    counts[0, 60:] = 50
    Trace(TraceMeta(model=stamp(), layers=(0, 1), num_tokens=10), {"count": counts}).save(tmp_path)
    routing = Routing(kind="trace", file=str(tmp_path))
    (_, skewed), (_, even) = layer_loads(routing, FREE, 2048, 8, 2)
    assert skewed.rho > 2 > 1.1 > even.rho


def test_a_placement_moves_and_copies_experts(tmp_path):
    counts = np.ones((1, 64))
    counts[0, :8] = 8
    np.savez(tmp_path / "t.npz", load=counts)
    spread = [e for d in range(8) for e in (d, *range(8 + 7 * d, 15 + 7 * d))]
    layer = LayerPlacement(
        layer=0, expert_of_slot=tuple(spread), method="test", rho=1.0, rho_before=2.0,
        rho_bound=1.0, gap=0.0,
    )  # fmt: skip
    placement = Placement(
        model=stamp(layers=1), num_devices=8, slots_per_device=8, method="test", layers=(layer,)
    )
    placement.save(tmp_path / "placement.json")
    trace = {"kind": "trace", "file": str(tmp_path / "t.npz")}
    before = layer_loads(Routing(**trace), FREE, 4096, 8, 1)[0][1]
    routing = Routing(**trace, placement=str(tmp_path / "placement.json"))
    after = layer_loads(routing, FREE, 4096, 8, 1)[0][1]
    assert before.rho > 2
    assert after.rho < 1.05
    with pytest.raises(ConfigError, match="on 8 devices; here are 64 experts on 4 ranks"):
        layer_loads(routing, FREE, 16, 4, 1)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (np.full((2, 8), np.nan), "finite and not negative"),
        (-np.ones((2, 8)), "finite and not negative"),
        (np.full((2, 8), "x"), "could not convert"),
    ],
)
def test_loads_that_cannot_be_are_named(tmp_path, load, words):
    np.savez(tmp_path / "trace.npz", load=load)
    routing = Routing(kind="trace", file=str(tmp_path / "trace.npz"))
    with pytest.raises(ArtifactError, match=words):
        layer_loads(routing, Grouping(num_experts=8, num_groups=2, top_k=2), 16, 2, 2)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "trace.npz").write_bytes(b"junk")
    routing = Routing(kind="trace", file=str(tmp_path / "trace.npz"))
    with pytest.raises(ArtifactError, match=r"trace\.npz"):
        layer_loads(routing, Grouping(num_experts=8, num_groups=2, top_k=2), 16, 2, 2)
