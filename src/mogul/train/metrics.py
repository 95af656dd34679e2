"""What a training tells while it runs: speed, MFU, and one JSON line an interval."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mogul.core.errors import ConfigError
from mogul.core.files import atomic_write
from mogul.core.units import show_count
from mogul.simulate.train import flop_per_token
from mogul.spec.hardware import hardware
from mogul.spec.hardware import names as device_names
from mogul.spec.model import ModelSpec

METRICS_FILE = "metrics.jsonl"
LOADS_FILE = "loads.jsonl"


def peak_flop_per_s(device: torch.device, dtype: str = "bf16") -> float | None:
    """Peak of the matrix units as the vendor states it; None for a device that is not listed."""
    if device.type == "cpu":
        return None
    name = str(torch.get_device_module(device).get_device_name(device)).lower()
    known = [key for key in device_names() if key in name]
    return hardware(max(known, key=len)).peak(dtype) if known else None


class Speedometer:
    """Tokens, seconds and FLOP since the last look; waiting for a save or a test does not count."""

    def __init__(self, model: ModelSpec, sequence_length: int, peak: float | None) -> None:
        self.flop_per_token = flop_per_token(model, sequence_length)
        self.peak = peak
        self.start()

    def start(self) -> None:
        """Begin a new interval."""
        self._tokens, self._start_s = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Tokens of one step."""
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        """Speed of the interval, which ends here."""
        seconds = max(time.perf_counter() - self._start_s, 1e-9)
        speed = self._tokens / seconds
        flop_per_s = speed * self.flop_per_token
        found = {"tokens_per_s": speed, "tflop_per_s": flop_per_s / 1e12}
        if self.peak:
            found["mfu"] = flop_per_s / self.peak
        self.start()
        return found


def note_of(line: Mapping[str, Any]) -> str:
    """The words beside the progress bar."""
    parts = [f"step {line['step']}", f"loss {line['loss']:.3f}"]
    parts.append(f"{show_count(round(line['tokens_per_s']))} tokens/s")
    parts.append(f"{line['tflop_per_s']:.3g} TFLOP/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    if "max_vio_in_groups" in line:
        parts.append(f"MaxVio {line['max_vio_in_groups']:.2f}")
    rhos = [key for key in line if key.startswith("rho_")]
    if rhos:
        parts.append(f"rho({rhos[-1].removeprefix('rho_')}) {line[rhos[-1]]:.2f}")
    return ", ".join(parts)


class MetricsLog:
    """`metrics.jsonl`, `loads.jsonl` and, where asked, TensorBoard; each line is flushed."""

    def __init__(self, folder: Path, *, resumed_step: int, tensorboard: bool) -> None:
        self.folder = folder
        for name in (METRICS_FILE, LOADS_FILE):
            _cut(folder / name, resumed_step)
        self._board = _board(folder) if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line of numbers."""
        self._append(METRICS_FILE, line)
        if self._board is not None:
            for key, value in line.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, line["step"])

    def write_loads(self, step: int, counts: list[list[int]]) -> None:
        """Rows of every expert in the interval that ends with `step`."""
        self._append(LOADS_FILE, {"step": step, "rows": counts})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Every whole line with its step; one that was cut off by a kill or damaged is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            found.append(content)
    return found


def _cut(file: Path, step: int) -> None:
    """Drop what a resumed run will write again."""
    if not file.exists():
        return
    kept = [line for line in read_lines(file) if line["step"] <= step]
    atomic_write(file, "".join(json.dumps(line) + "\n" for line in kept))


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard=true, but tensorboard is not installed",
            fix="pip install tensorboard, or set log.tensorboard=false",
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
