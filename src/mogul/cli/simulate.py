"""`mogul simulate`: the table of its verbs; each is a module of its own."""

from __future__ import annotations

SUBVERBS = {
    "run": ("mogul.cli.simulate_run", "one point: latency, throughput, memory, what limits it"),
    "sweep": ("mogul.cli.simulate_sweep", "deployments -> the ones nothing beats"),
    "compare": ("mogul.cli.simulate_compare", "grouped against free routing, experts vs dense"),
    "shape": ("mogul.cli.simulate_shape", "which model shape to train, as Pangu Pro MoE's was"),
    "train": ("mogul.cli.simulate_train", "time, memory, bubbles and MFU of a training step"),
    "serve": ("mogul.cli.simulate_serve", "requests as events: percentiles of TTFT and TPOT"),
    "calibrate": ("mogul.cli.simulate_calibrate", "measure this machine for the others"),
    "hw": ("mogul.cli.simulate_hw", "the machines mogul knows, with a source a number"),
    "validate": (
        "mogul.cli.simulate_validate",
        "predictions against measurements; fails below bars",
    ),
}

EXAMPLES = """
examples:
  mogul simulate hw
  mogul simulate run preset:qwen3-30b-a3b --device h100 --batch 16
  mogul simulate sweep --help              options and examples of one verb
"""
