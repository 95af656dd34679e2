"""Who runs a model on pages: the last of them gives it back as it was.

Several engines may run one model, one after another or at once; the attention and the gradient
flags that it came with are kept until none of them is left.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

from transformers import PreTrainedModel

from mogul.core.errors import BackendError
from mogul.serve.attention import NAME


@dataclass
class _Loan:
    attention: str
    trained: frozenset[str]
    """Names of the parameters that took gradients."""

    holders: WeakSet[object] = field(default_factory=WeakSet)


_loans: WeakKeyDictionary[PreTrainedModel, _Loan] = WeakKeyDictionary()
_lock = threading.RLock()


def borrow(model: PreTrainedModel, holder: object) -> None:
    """Set a model to pages, for as long as somebody holds it.

    Raises:
        BackendError: its attention does not go through Transformers' interface.
    """
    if not model._can_set_attn_implementation():
        raise BackendError(
            f"{type(model).__name__} does not take its attention from Transformers' interface, "
            "so the engine cannot give it pages",
            fix="use Transformers' generate for this family",
        )
    with _lock:
        loan = _loans.get(model)
        if loan is None:
            trained = frozenset(n for n, weight in model.named_parameters() if weight.requires_grad)
            loan = _loans[model] = _Loan(model.config._attn_implementation or "sdpa", trained)
        loan.holders.add(holder)
        model.set_attn_implementation(NAME)


def give_back(model: PreTrainedModel, holder: object) -> None:
    """Let go of a model; with nobody left it has its own attention and gradient flags again.

    It stays in evaluation mode, and weights that were fused stay fused (and frozen).
    """
    with _lock:
        loan = _loans.get(model)
        if loan is None:
            return
        loan.holders.discard(holder)
        if loan.holders:
            return
        del _loans[model]
        if loan.attention != NAME:
            model.set_attn_implementation(loan.attention)
        for name, weight in model.named_parameters():
            if name in loan.trained:
                weight.requires_grad_(True)
