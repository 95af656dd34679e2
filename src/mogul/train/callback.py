"""Balance in somebody else's training loop: a callback for Transformers' Trainer and TRL.

It does what a recipe's `[balance]` does: losses through the routers, the selection bias after
each step, and the routing numbers in the log. The model's own balance loss is set aside, so that
it does not pull twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from mogul.core.log import say
from mogul.observe.live import live_numbers
from mogul.train.balance import Balancer
from mogul.train.balance_rules import BalanceSection


class MogulCallback(TrainerCallback):
    """Give it to a Trainer: `Trainer(..., callbacks=[MogulCallback()])`.

    Args:
        balance: losses, bias and warm-up; by default the batch loss with coefficient 0.01.
    """

    def __init__(self, balance: BalanceSection | None = None) -> None:
        self.balance = balance or BalanceSection()
        self.balancer: Balancer | None = None
        self._had_own_loss = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Dress the routers; a training that was interrupted before leaves nothing behind."""
        model = kwargs["model"]
        self._leave()
        if getattr(model.config, "output_router_logits", False):
            say("output_router_logits is set aside in training: MogulCallback balances")
            model.config.output_router_logits, self._had_own_loss = False, True
        self.balancer = Balancer(
            model,
            self.balance,
            micro_batches=args.gradient_accumulation_steps,
            num_steps=state.max_steps,
            reduce=torch.distributed.all_reduce if args.world_size > 1 else None,
        )
        moved = int(self.balance.bias_until * state.max_steps)
        steps = state.global_step  # of a training that is resumed
        self.balancer.restore({"steps": steps, "updates": min(steps, moved)})
        self.balancer.__enter__()
        self.balancer.begin_step(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bias."""
        assert self.balancer is not None
        self.balancer.end_step()
        self.balancer.begin_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add MaxVio, rho and dead experts to the training's log lines."""
        logs = kwargs.get("logs") or {}
        if self.balancer is None or "loss" not in logs:
            return
        counts, losses = self.balancer.take()
        grouping = self.balancer.shape.grouping
        no_sample = np.zeros((len(counts), 0, grouping.top_k), dtype=np.int64)
        numbers = {**live_numbers(counts.numpy(), no_sample, grouping).flat(), **losses}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model back as it was."""
        self._leave()

    def _leave(self) -> None:
        if self.balancer is None:
            return
        self.balancer.__exit__()
        config: Any = self.balancer.model.config
        if self._had_own_loss:
            config.output_router_logits, self._had_own_loss = True, False
        self.balancer = None
