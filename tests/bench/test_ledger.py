import json
from pathlib import Path

import pytest

from mogul.bench import ledger


def test_rows_are_complete_and_only_added(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = ledger.row(bench="b", case="c", metric="time", unit="s", value=1.5, runs=5)
    ledger.append([first], path)
    ledger.append([{**first, "value": 2.5}], path)
    rows = ledger.read(path)
    assert [row["value"] for row in rows] == [1.5, 2.5]
    assert {"date", "commit", "device", "versions", "command"} <= rows[0].keys()
    assert rows[0]["device"]
    assert rows[0]["versions"]["python"]


def test_an_incomplete_row_is_refused():
    with pytest.raises(TypeError, match="needs unit, runs"):
        ledger.row(bench="b", case="c", metric="time", value=1.5)


def test_the_shipped_ledger_can_be_read():
    path = Path(__file__).parents[2] / "benchmarks" / "ledger.jsonl"
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"date", "commit", "bench", "device", "versions", "case", "metric"} <= row.keys()
