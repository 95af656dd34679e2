"""The calls that paged attention's reference is tested with, for the tests of its kernels."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location(
    "test_paged_attention", Path(__file__).parents[1] / "test_paged_attention.py"
)
assert _spec
assert _spec.loader
_calls = module_from_spec(_spec)
_spec.loader.exec_module(_calls)

make, run = _calls.make, _calls.run
