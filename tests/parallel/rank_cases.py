"""The list of cases that ranks compute, and what counts as equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mogul.parallel import World

EXPERTS, PICKS, WIDTH, INNER = 16, 4, 12, 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
CASES: dict[str, Callable[[World], None]] = {}


def case(name: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def note(function: Callable[[World], None]) -> Callable[[World], None]:
        CASES[name] = function
        return function

    return note


def near(given: Tensor, wanted: Tensor, what: str, atol: float | None = None) -> None:
    atol = TOLERANCE[wanted.dtype] if atol is None else atol
    torch.testing.assert_close(given, wanted, atol=atol, rtol=atol, msg=lambda m: f"{what}: {m}")
