"""The machines mogul can price: one record a device, a source for every number.

`devices/*.toml` ships with mogul; a path to a file of the same form works wherever a name does,
and may start from a shipped one with `extends = "h100"`. Peaks are dense (no 2:4 sparsity).
What a device reaches in practice is not here but in `mogul.simulate.calibration`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from mogul.core.errors import ArtifactError, ConfigError, nearest
from mogul.spec.base import Spec

DEVICE_DIR = Path(__file__).parent / "devices"

_FALLBACK = {
    "fp4": ("fp8", "int8", "bf16", "fp16", "fp32"),
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("bf16", "fp16", "fp32"),
    "int4": ("int8", "bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "fp32": ("bf16", "fp16"),
}
_NUMBERS = (
    "memory_bytes",
    "memory_bytes_per_s",
    "l2_bytes",
    "link_bytes_per_s",
    "link_devices",
    "network_bytes_per_s",
    "link_latency_s",
    "network_latency_s",
    "launch_s",
    "power_w",
    "price_per_hour",
)


class Hardware(Spec):
    """One accelerator (or CPU socket) and the links around it; base units throughout."""

    name: str
    title: str
    architecture: str
    """Devices of one architecture lend each other measured utilisation."""

    peak_flop_per_s: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Dense peak by arithmetic: bf16, fp16, fp32, fp8, int8, fp4."""

    memory_bytes: float = Field(gt=0)
    memory_bytes_per_s: float = Field(gt=0)
    l2_bytes: float | None = Field(default=None, gt=0)
    link_bytes_per_s: float = Field(gt=0)
    """Scale-up bandwidth of one device, one direction (PCIe where there is no other link)."""

    link_devices: int = Field(ge=1)
    """Devices that reach each other over the scale-up link."""

    network_bytes_per_s: float | None = Field(default=None, gt=0)
    """Scale-out bandwidth of one device, one direction; None means one domain only."""

    link_latency_s: float = Field(default=3e-6, ge=0)
    """What one step of a collective costs inside the domain."""

    network_latency_s: float = Field(default=8e-6, ge=0)
    launch_s: float = Field(default=4e-6, ge=0)
    """Host time to launch one kernel without a graph."""

    power_w: float | None = Field(default=None, gt=0)
    price_per_hour: float | None = Field(default=None, ge=0)
    """US dollars an hour for one device; None where no trustworthy number was read."""

    sources: dict[str, str]
    """Where each number comes from, by field (`peak_flop_per_s.bf16` for one peak)."""

    @model_validator(mode="after")
    def _every_number_has_a_source(self) -> Self:
        known = {f"peak_flop_per_s.{dtype}" for dtype in self.peak_flop_per_s} | set(_NUMBERS)
        if strange := set(self.sources) - known:
            raise ConfigError(
                f"device {self.name!r}: a source is given for {min(strange)!r}, no such number",
                fix=nearest(min(strange), known),
            )
        given = {key for key in _NUMBERS if key in self.model_fields_set}
        given = {key for key in given if getattr(self, key) is not None}
        needed = given | {key for key in known if key.startswith("peak")}
        if missing := sorted(needed - set(self.sources)):
            raise ConfigError(
                f"device {self.name!r}: no source is given for {', '.join(missing)}",
                fix="add the key to [sources]: datasheet, a measurement, or 'guess'",
            )
        return self

    def peak(self, dtype: str) -> float:
        """FLOP/s (or OP/s) for arithmetic in `dtype`, or the next wider kind the device has."""
        for kind in (dtype, *_FALLBACK.get(dtype, ())):
            if kind in self.peak_flop_per_s:
                return self.peak_flop_per_s[kind]
        raise ConfigError(
            f"device {self.name!r} has no arithmetic for {dtype!r}",
            fix=f"use one of {', '.join(self.peak_flop_per_s)}",
        )


def names() -> tuple[str, ...]:
    """Names of the shipped devices."""
    return tuple(sorted(path.stem for path in DEVICE_DIR.glob("*.toml")))


def hardware(name: str) -> Hardware:
    """Return a shipped device, or the one a TOML file describes.

    Raises:
        ConfigError: no such device (with the nearest names), an unknown key, a missing source.
        ArtifactError: the file cannot be read.
    """
    if name.endswith(".toml"):
        return _from_file(Path(name))
    return _shipped(_bare(name))


def _bare(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


@cache
def _shipped(name: str) -> Hardware:
    if name not in names():
        raise ConfigError(f"unknown device {name!r}", fix=_near_names(name))
    return _from_file(DEVICE_DIR / f"{name}.toml")


def _near_names(name: str) -> str:
    close = [known for known in names() if known in name or name in known]
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return nearest(name, names()) + ", or give the path of your own .toml file"


def _from_file(path: Path) -> Hardware:
    return Hardware.parse(_read(path), where=path.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist", fix="give a TOML file, or a name from `mogul simulate hw`"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ArtifactError(f"{path} is not TOML: {error}", fix="mend the line it names") from None
    parent = values.pop("extends", None)
    if parent is None:
        return {"name": path.stem, **values}
    return _merged(_read(DEVICE_DIR / f"{_shipped(_bare(parent)).name}.toml"), values, path.stem)


def _merged(parent: dict[str, Any], child: Mapping[str, Any], name: str) -> dict[str, Any]:
    merged = {**parent, "name": name, "title": name, **child}
    for table in ("peak_flop_per_s", "sources"):
        merged[table] = {**parent[table], **child.get(table, {})}
    return merged
