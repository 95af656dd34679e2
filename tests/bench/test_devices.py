"""`mogul bench devices`: what it counts, what it shows, and that it runs on CPU ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mogul.bench import devices
from mogul.bench import devices_cases as cases
from mogul.bench.devices_report import gain_chart, ledger_rows, table, timeline, training_rows
from mogul.bench.kernels import LayerShape
from mogul.cli.main import main
from mogul.spec import balance

SHAPE = LayerShape(16, 4, 16, 8, 4)
FACTS = {
    "tflop_per_s": 1.0, "memory_gb_per_s": 2.0, "link_gb_per_s": 3.0, "link_latency_s": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("groups", [1, 4])
def test_picks_are_distinct_and_keep_to_their_groups(routing, groups):
    ids = cases.draw_picks(SHAPE, groups, routing, 50)
    assert ids.shape == (50, 4)
    assert all(len(set(row)) == 4 for row in ids)
    if groups == 4:
        assert (ids // 4 == np.arange(4)).all()


def test_skew_makes_some_experts_busier():
    def most(routing: str) -> int:
        ids = cases.draw_picks(SHAPE, 1, routing, 400)
        return np.bincount(ids.ravel(), minlength=16).max()

    assert most("skewed") > 1.5 * most("uniform")


def inputs(ids: list[list[int]]) -> cases.Inputs:
    none = np.zeros(0)
    return cases.Inputs(none, none, none, 1.0, 1.0, 0, np.array(ids))  # type: ignore[arg-type]


def test_bytes_sent_are_counted_by_hand():
    """Two ranks of two tokens: rank 0's tokens go 1 and 0 times over, rank 1's both do."""
    ids = [[0, 1, 2, 9], [0, 1, 2, 3], [0, 9, 10, 11], [7, 8, 9, 10]]
    row, picks = 16 * 2, 8 * 4
    static = cases.sent_bytes(inputs(ids), cases.Way("grouped", "static"), 2, SHAPE, 2)
    assert static == 2 * (row + picks) + 2 * row
    exchanged = cases.sent_bytes(inputs(ids), cases.Way("top-k", "all_to_all"), 2, SHAPE, 2)
    # rank 0 sends 1 token and 2 sums; rank 1 sends 2 tokens and 1 sum
    assert exchanged == max(1 * (row + picks) + 2 * row, 2 * (row + picks) + 1 * row)


def a_row(**more) -> dict:
    return {
        "shape": "16x4x16x8x4", "ranks": 2, "tokens": 64, "routing": "skewed",
        "way": "grouped static", "layer_s": 4e-4, "experts_s": [1e-4, 3e-4],
        "wait_s": [2e-4, 0.0], "exposed_s": 1e-4, "exposed": 0.25, "floor_s": 2e-4, "ratio": 2.0,
        "rho": 1.0, "delta": 1.1, "sent_bytes": 2048, "called_s": 4e-4, **more,
    }  # fmt: skip


def test_the_table_shows_waits_and_names_what_was_refused():
    refused = {"shape": "s", "ranks": 2, "way": "top-k static", "refused": "legal is ep = 1"}
    shown = table([a_row(), refused], FACTS)
    line = dict(zip(shown.columns, shown.rows[0], strict=True))
    assert line["layer us"] == 400
    assert line["waits us"] == 200
    assert line["exposed %"] == "25"
    assert any("top-k static: legal is ep = 1" in note for note in shown.notes)
    assert len(shown.rows) == 1


def test_the_timeline_has_a_bar_for_every_rank_and_chunk():
    one = {"shape": "s", "tokens": 64, "routing": "skewed", "way": "grouped static x2"}
    marks = [0.0, 1e-4, 2e-4, 2.5e-4, 3e-4, 4e-4]
    svg = timeline([{**one, "rank": r, "marks_s": marks} for r in (0, 1)])
    assert svg.count("<rect") == 2 * (1 + 2)
    assert "rank 1" in svg
    assert "400.00 us" in svg


def test_ledger_rows_hold_floor_and_ratio():
    slower = a_row(way="top-k gather", layer_s=5e-4, rho=1.2)
    slowest = a_row(way="grouped all_to_all", layer_s=9e-4)
    (row,) = ledger_rows([slowest, a_row(), slower, {"refused": "no"}], FACTS, "two devices")
    assert row["bench"] == "devices"
    assert (row["value"], row["floor"], row["ratio"]) == (4e-4, 2e-4, 2.0)
    assert (row["gain"], row["detail"]["top-k rho"], row["peers"]["top-k gather"]) == (
        1.25,
        1.2,
        5e-4,
    )
    steps = [
        {"ranks": r, "tokens_per_s": t, "step_s": 1.0, "dispatch": "static", "chunks": 1}
        for r, t in ((1, 100.0), (2, 190.0))
    ]
    assert [row["gain"] for row in training_rows(steps, "two devices")] == [1.0, 1.9]


def test_the_chart_compares_with_the_best_static_way():
    ways = {"grouped static": 5e-4, "grouped static window": 4e-4, "top-k gather": 6e-4}
    rows = [a_row(way=way, layer_s=s, model="pangu-pro") for way, s in ways.items()]
    (series,) = gain_chart(rows, "GPU").series
    assert (series.name, list(series.x)) == ("gathered", ["pangu\n64"])
    assert list(series.y) == [pytest.approx(1.5)]


def test_the_means_of_draws_order_ranks_by_load():
    one = {"layer_s": 3.0, "experts_s": [1.0, 2.0], "floor_s": 1.0, "exposed_s": 1.0, "rho": 1.0}
    two = {**one, "layer_s": 5.0, "experts_s": [4.0, 1.0], "rho": 1.2}
    found = devices._mean([one, two])
    assert (found["layer_s"], found["experts_s"], found["ratio"]) == (4.0, [3.0, 1.0], 4.0)
    assert found["exposed"] == 0.25
    assert found["rho"] == pytest.approx(1.1)


def test_skewed_draws_span_the_luck_of_an_ungrouped_router():
    device_E = np.arange(SHAPE.experts) // 8

    def rho(seed):
        ids_TK = cases.draw_picks(SHAPE, 1, "skewed", cases.JUDGED_TOKENS, seed)
        return balance.rho(balance.rows_per_device(ids_TK, device_E, 2))

    low, middle, high = map(rho, cases.seeds_of(SHAPE, "skewed", 2, 3))
    assert low < middle < high
    assert cases.seeds_of(SHAPE, "uniform", 2, 2) == (0, 1)


def test_it_runs_on_processes_of_the_processor(tmp_path, capfd):
    words = "bench devices --cpu --shape 16x4x16x8x4 --tokens 8 --routing skewed --format json"
    assert (
        main([*words.split(), "--train-layers", "1", "--length", "16", "--out", str(tmp_path)]) == 0
    )
    found = json.loads((tmp_path / "devices.json").read_text())
    ways = {row["way"]: row for row in found["rows"]}
    assert ways["grouped static"]["rho"] == 1.0
    assert ways["top-k all_to_all"]["rho"] > 1.0
    refused = {way: row["refused"] for way, row in ways.items() if "refused" in row}
    assert all("window" in way or way == "top-k transformers" for way in refused), refused
    for row in (row for row in found["rows"] if "refused" not in row):
        assert row["layer_s"] > 0
        assert len(row["experts_s"]) == 2
        assert row["exposed"] == pytest.approx(1 - max(row["experts_s"]) / row["layer_s"])
    assert [step["ranks"] for step in found["training"]] == [1, 2]
    assert found["training"][0]["loss"] == pytest.approx(found["training"][1]["loss"], abs=0.2)
    page = (tmp_path / "devices.html").read_text()
    assert page.count("<rect") >= 4
    assert "grouped static" in capfd.readouterr().out


def test_a_decode_row_tells_what_its_step_spends_time_in():
    from mogul.bench.devices_report import decode_rows

    step = {"layout": "tp2 ep2", "wire": "window", "compiled": False, "layers": 48, "context": 1024}
    step |= {"step_s": 0.01, "floor_s": 0.004, "ratio": 2.5}
    found = [["push_words", 96, 1e-4], ["push_words", 1, 2e-4], ["up_tokens", 48, 1e-3]]
    profile = {"layout": "tp2 ep2", "wire": "window", "compiled": False, "batch": 1, "found": found}
    one, many = decode_rows([step | {"batch": 1}, step | {"batch": 64}], "GPU", [profile])
    assert one["kernels_us"] == {"push_words": 300.0, "up_tokens": 1000.0}
    assert "kernels_us" not in many


def test_ranks_that_cannot_share_the_experts_are_refused_before_any_starts(capsys):
    for ranks, told in (
        ("3", "32 experts cannot be shared equally by ep=3 ranks"),
        ("0", "0 ranks hold no expert"),
    ):
        assert main(["bench", "devices", "--cpu", "--ranks", ranks, "--tokens", "16"]) == 2
        assert told in capsys.readouterr().err
    assert main(["bench", "devices", "--cpu", "--tokens", "0"]) == 2
    assert "0 tokens of all ranks" in capsys.readouterr().err
