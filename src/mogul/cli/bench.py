"""`mogul bench`: the table of its verbs; each is a module of its own."""

from __future__ import annotations

SUBVERBS = {
    "kernels": ("mogul.cli.bench_kernels", "time the experts layer here against its floor"),
    "serve": ("mogul.cli.bench_serve", "time answers of the engine against their floor"),
    "devices": ("mogul.cli.bench_devices", "time experts spread over devices: who waits for whom"),
}

EXAMPLES = """
examples:
  mogul bench kernels
  mogul bench kernels --help               options and examples of one verb
"""
