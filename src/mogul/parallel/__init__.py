"""Many devices, one model: dispatch of tokens to experts, layouts, sharded training.

`lay_out` spreads a Transformers model over ranks for decoding or training; `spread_experts` only
its experts; `shard_for_training` adds FSDP2 for the rest. All use one dispatcher interface
(`make_dispatcher`: "static", "gather", "all_to_all"). `launch` starts ranks on this machine.
"""

from __future__ import annotations

from mogul.parallel import exchange as _exchange  # noqa: F401  (registers itself)
from mogul.parallel import static as _static  # noqa: F401
from mogul.parallel.checkpoint import load_sharded, save_sharded, whole_state
from mogul.parallel.dispatch import DISPATCH, Dispatcher, Plan, agree, make_dispatcher
from mogul.parallel.layout import Laid, lay_out, sync_gradients
from mogul.parallel.owners import Owners, contiguous, placed
from mogul.parallel.process import World, launch, start, stop
from mogul.parallel.shard import ExpertSpread, spread_experts
from mogul.parallel.training import by_mesh, clip_gradients, shard_for_training

__all__ = [
    "DISPATCH",
    "Dispatcher",
    "ExpertSpread",
    "Laid",
    "Owners",
    "Plan",
    "World",
    "agree",
    "by_mesh",
    "clip_gradients",
    "contiguous",
    "launch",
    "lay_out",
    "load_sharded",
    "make_dispatcher",
    "placed",
    "save_sharded",
    "shard_for_training",
    "spread_experts",
    "start",
    "stop",
    "sync_gradients",
    "whole_state",
]
