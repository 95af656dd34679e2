import pytest

from mogul.core.errors import ConfigError
from mogul.core.units import GB, GIB, parse_bytes, show_bytes, show_count, show_s


@pytest.mark.parametrize(
    ("text", "want"),
    [("80 GiB", 80 * GIB), ("1.5GB", 1.5 * GB), ("4096", 4096), (" 2 kib ", 2048), ("7 b", 7)],
)
def test_parse_bytes(text, want):
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GiB", "3 parsecs", "-1 GB", "1,5 GB"])
def test_parse_bytes_refuses_what_is_no_size(text):
    with pytest.raises(ConfigError, match="is not a number of bytes"):
        parse_bytes(text)


def test_more_bytes_than_any_memory_are_refused():
    with pytest.raises(ConfigError, match="'1e400 GB' is more than any memory"):
        parse_bytes("1e400 GB")


def test_showing_picks_the_unit():
    assert show_bytes(1.5 * GIB) == "1.50 GiB"
    assert show_bytes(12) == "12 B"
    assert show_count(71_988_781_056) == "71.99 B"
    assert show_count(42) == "42"
    assert show_s(0.00234) == "2.34 ms"
    assert show_s(150) == "2 min 30 s"
