"""Measurements that survive each other: one that hangs costs itself, the rest is measured."""

from __future__ import annotations

import sys
import time
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import device_units
import pytest

from mogul.bench import devices_units
from mogul.bench.devices_units import Unit, read_rows, run_units
from mogul.core.errors import MogulError


def test_rows_of_another_run_in_the_folder_count_for_nothing(tmp_path, monkeypatch):
    begin, end = '{"part": "begin", "unit": "%s"}\n', '{"part": "end", "unit": "%s"}\n'
    rows = tmp_path / devices_units.ROWS
    rows.write_text(begin % "a" + end % "a" + begin % "b" + begin % "c")
    told = []

    def launch(_function, _ranks, left, _folder, _began_s, _end_s, lost, **_options):
        told.append(([unit.name for unit in left], sorted(lost)))
        if len(told) == 1:
            with rows.open("a") as file:
                file.write(begin % "a")
            raise MogulError("the ranks died")

    monkeypatch.setattr(devices_units, "launch", launch)
    units = [Unit(name, 1, device_units.count) for name in "abc"]
    run_units(units, 2, tmp_path, 60, on_cpu=True)
    assert told == [(["a", "b", "c"], []), (["b", "c"], ["a"])]


@pytest.fixture
def ranks_that_are_heard(capfd):
    """Ranks speak to where the process that forks them was started."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    yield capfd
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.full
def test_a_unit_that_hangs_on_one_rank_is_lost_and_the_others_are_measured(
    tmp_path, ranks_that_are_heard
):
    units = [
        Unit("first", 30, device_units.count),
        Unit("stuck", 1, device_units.hang),
        Unit("failing", 30, device_units.fail),
        Unit("last", 30, device_units.count),
        Unit("too long", 3000, device_units.count),
    ]
    start_s = time.monotonic()
    run_units(units, 2, tmp_path, 120, on_cpu=True)
    assert time.monotonic() - start_s < 110
    rows = read_rows(tmp_path)
    assert [row["ranks"] for row in rows if row["part"] == "counted"] == [2, 2]
    assert [row["lost"] for row in rows if row["part"] == "counted"] == [[], ["stuck"]]
    assert [row["unit"] for row in rows if row["part"] == "end"] == ["first", "failing", "last"]
    assert [row["unit"] for row in rows if row["part"] == "skip"] == ["too long"]
    assert "ValueError: broken" in next(row["failed"] for row in rows if "failed" in row)
    assert "in hang" in ranks_that_are_heard.readouterr().err  # where it stood
