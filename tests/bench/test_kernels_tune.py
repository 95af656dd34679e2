"""The search for tiles: it finds the fastest, and what it writes is read back."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from mogul.bench.kernels_tune import (
    candidates,
    forced,
    plan_row,
    row_tiles,
    search,
    search_few,
    use,
    write,
)
from mogul.cli.main import main
from mogul.kernels.triton import layer, plans
from mogul.kernels.triton.plans import USER_PLANS, Plan, Shape, Tile, few_plan, plan_for

SHAPE = Shape(60, 4, 2048, 1408, capability=90)


def time_of(plan: Plan, tokens: int) -> float:
    """A made-up device that likes one plan best."""
    spent = 1 + 0.1 * (plan.rows != 32)
    spent += 0.2 * (plan.up.n != 64) + 0.1 * (plan.up.k != 128) + 0.05 * (not plan.up.swap)
    return spent + 0.2 * (plan.down.n != 32) + 0.1 * (plan.down.stages != 4)


class Clock:
    """A timer that keeps which plans it was to prepare, and asks a function for their times."""

    def __init__(self, seconds):
        self.seconds, self.prepared = seconds, []

    def __call__(self, plan, tokens):
        return self.seconds(plan, tokens)

    def prepare(self, plans, tokens):
        self.prepared.append([*plans])


def test_the_search_finds_the_best_of_both_products():
    timer = Clock(time_of)
    best = search(SHAPE, 300, timer)
    assert len(timer.prepared) == 4  # two row tiles, up and down of each: compiled together
    assert all(len(set(plans)) == len(plans) > 4 for plans in timer.prepared)
    assert best.rows == 32
    assert (best.up.n, best.up.k, best.up.swap) == (64, 128, True)
    assert (best.down.n, best.down.stages) == (32, 4)
    assert time_of(best, 300) == 1


def test_a_device_that_runs_no_candidate_keeps_the_rule():
    rule = plans.rule(SHAPE, 300)
    timer = Clock(lambda plan, _: 1.0 if plan == rule else float("inf"))
    assert search(SHAPE, 300, timer) == rule


def test_the_search_without_a_sort_varies_one_side_after_the_other(tmp_path, monkeypatch):
    best = search_few(
        SHAPE, 1, Clock(lambda plan, _: abs(plan.up_n - 2) + abs(plan.down_k - 1024) / 512)
    )
    assert (best.up_n, best.down_k) == (2, 1024)
    write([plan_row(SHAPE, 1, best)], tmp_path, "H100")
    monkeypatch.setenv(USER_PLANS, str(tmp_path / "plans.json"))
    few_plan.cache_clear()
    try:
        assert few_plan(SHAPE) == best != plans.few_rule(SHAPE)
    finally:
        few_plan.cache_clear()
    with forced(best):
        assert layer.few_plan(SHAPE) is best
    assert layer.few_plan is few_plan


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("up", [True, False])
def test_candidates_fit_and_keep_to_the_device(capability, rows, up):
    shape = Shape(60, 4, 2048, 1408, capability=capability)
    tiles = candidates(rows, shape, up=up)
    assert 4 < len(tiles) == len(set(tiles))
    for tile in tiles:
        assert tile.split == (rows == 128 and capability == 90)
        assert not tile.swap or (rows <= 64 and tile.n >= 64)


def test_row_tiles_follow_the_rows_of_an_expert():
    assert row_tiles(SHAPE, 1) == [16]
    assert row_tiles(SHAPE, 300) == [16, 32]
    assert row_tiles(SHAPE, 100_000) == [64, 128]


def test_what_is_written_is_used(tmp_path, monkeypatch):
    tile = Tile(n=32, k=128, group=1, warps=4, swap=False, stages=4)
    mine = Plan(rows=32, up=tile, down=Tile(n=64, k=64))
    write([plan_row(SHAPE, 300, mine)], tmp_path, "NVIDIA H100 80GB HBM3")
    write([plan_row(SHAPE, 8, mine)], tmp_path, "NVIDIA H100 80GB HBM3")
    assert [row["tokens"] for row in json.loads((tmp_path / "plans.json").read_text())] == [300, 8]
    monkeypatch.setenv(USER_PLANS, "")
    use(tmp_path / "plans.json")
    try:
        found = plan_for(SHAPE, 200)
        assert (found.rows, found.up, found.down) == (mine.rows, mine.up, mine.down)
        assert found.down_grad is not None
        other = Shape(60, 4, 2048, 1408, capability=80)
        assert plan_for(other, 200) == plans.rule(other, 200)
    finally:
        plan_for.cache_clear()
    name = "E=60,N=1408,device_name=NVIDIA_H100_80GB_HBM3.json"
    config = json.loads((tmp_path / "vllm" / name).read_text())
    assert config["8"] == {
        "BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1,
        "SPLIT_K": 1, "num_warps": 4, "num_stages": 4,
    }  # fmt: skip


def test_a_forced_plan_ends_with_its_block():
    before = layer.plan_for
    plan = plans.rule(SHAPE, 300)
    with forced(plan):
        assert layer.plan_for(SHAPE, 1) is plan
    assert layer.plan_for is before


def test_a_processor_cannot_be_tuned(capsys):
    assert main(["bench", "kernels", "--shape", "8x2x32x16", "--tune"]) == 1
    assert "tile sizes belong to GPU kernels" in capsys.readouterr().err
