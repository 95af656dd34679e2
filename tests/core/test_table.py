import io
import json

from mogul.core.table import Table

TABLE = Table("Loads", ["device", "rows"], [["0", 12], ["1", 4]], notes=["rho is 1.5"])


def shown(format, table=TABLE):
    out = io.StringIO()
    table.show(format, file=out)
    return out.getvalue()


def test_json_holds_records_and_notes():
    data = json.loads(shown("json"))
    assert data["rows"] == [{"device": "0", "rows": 12}, {"device": "1", "rows": 4}]
    assert data["notes"] == ["rho is 1.5"]


def test_json_prefers_exact_data():
    table = Table("x", ["a"], [["1.2 GB"]], data={"bytes": 1_234}, extra={"version": 1})
    assert json.loads(shown("json", table)) == {"bytes": 1234, "version": 1}


def test_csv_is_plain():
    assert shown("csv") == "device,rows\n0,12\n1,4\n"


def test_the_terminal_table_shows_every_cell_and_note():
    text = shown("table")
    for part in ("Loads", "device", "12", "rho is 1.5"):
        assert part in text
    assert "[bold]x" in shown("table", Table("t", ["a"], [["[bold]x"]]))


def test_where_room_is_short_words_fold_and_no_number_is_cut():
    columns = [f"column number {index}" for index in range(12)]
    table = Table("narrow", columns, [[f"{index}.234e+17" for index in range(12)]])
    lines = shown("table", table).splitlines()
    assert max(map(len, lines)) <= 12 * (10 + 4)
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)
    assert [f"{index}.234e+17" for index in range(12)] == lines[-2].split()


def test_large_floats_are_whole_numbers_and_nameless_columns_have_no_head():
    text = shown("table", Table("t", ["ms"], [[15967.8], [31.8], [4.9e24]]))
    assert text.split()[-3:] == ["15968", "31.8", "4.9e+24"]
    lines = shown("table", Table("t", ["", ""], [["step", "18 s"]])).splitlines()
    assert [line.split() for line in lines] == [["t"], ["step", "18", "s"], []]
