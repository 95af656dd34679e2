"""Numbers with units at the edge: the only place that knows what a GB or a GiB is.

Inside mogul numbers are base units (bytes, seconds, FLOP) and their names end in the unit.
GB = 10^9 bytes, GiB = 2^30 bytes.
"""

from __future__ import annotations

import re

from mogul.core.errors import ConfigError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_BYTE_UNITS = {
    "b": 1, "": 1,
    "kb": KB, "mb": MB, "gb": GB, "tb": TB,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read "80 GiB", "1.5GB" or "4096" as bytes."""
    match = _NUMBER.fullmatch(text)
    if not match or match[2].lower() not in _BYTE_UNITS:
        raise ConfigError(
            f"{text!r} is not a number of bytes",
            fix="write for example '80 GiB', '512MB' or '4096'",
        )
    num_bytes = float(match[1]) * _BYTE_UNITS[match[2].lower()]
    if num_bytes > 2**63:
        raise ConfigError(f"{text!r} is more than any memory", fix="write less, like '80 GiB'")
    return round(num_bytes)


def _scaled(value: float, steps: list[tuple[float, str]], digits: int) -> str:
    for scale, unit in steps:
        if abs(value) >= scale:
            return f"{value / scale:.{digits}f} {unit}"
    scale, unit = steps[-1]
    return f"{value / scale:.{digits}f} {unit}"


def show_bytes(num_bytes: float, digits: int = 2) -> str:
    """1610612736 -> "1.50 GiB"."""
    if abs(num_bytes) < KIB:
        return f"{num_bytes:.0f} B"
    return _scaled(num_bytes, [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")], digits)


def show_count(count: float, digits: int = 2) -> str:
    """71988781056 -> "71.99 B" (thousand K, million M, billion B, trillion T)."""
    if abs(count) < 1000:
        return f"{count:.0f}"
    return _scaled(count, [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")], digits)


def show_s(seconds: float, digits: int = 2) -> str:
    """0.00234 -> "2.34 ms"."""
    if seconds >= 120:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return _scaled(seconds, [(1, "s"), (1e-3, "ms"), (1e-6, "us")], digits)
