"""Upcycling: a dense checkpoint becomes a MoGE that computes the same function at step 0.

`plan` says what is legal, `algebra` which numbers go where, `memory` fills a loaded model,
`checkpoint` streams files (`source` checks them, `jobs` orders the work). Ideas: virtual-group
initialisation (arXiv 2410.07524) for the shards, MoGE's one pick a group (arXiv 2505.21411) for
equality under any router.
"""

from __future__ import annotations

from mogul.models.upcycle.card import UpcycleReport
from mogul.models.upcycle.checkpoint import upcycle_checkpoint
from mogul.models.upcycle.memory import upcycle
from mogul.models.upcycle.plan import DENSE_MODELS, UpcyclePlan

__all__ = ["DENSE_MODELS", "UpcyclePlan", "UpcycleReport", "upcycle", "upcycle_checkpoint"]
