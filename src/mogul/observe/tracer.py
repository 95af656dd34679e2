"""The tracer: a model at work in, a trace out; for calibration runs, training and serving alike.

Hooks keep each layer's picks until the model's forward ends, then all layers are counted at once.
A layer that runs again outside a forward (gradient checkpointing) is not counted twice.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mogul.core.errors import BackendError, MogulError
from mogul.observe.accumulate import RoutingCounts
from mogul.observe.activations import ActivationSums, tap_experts
from mogul.observe.hooks import Picks, watch
from mogul.observe.sample import TokenSample
from mogul.spec.families import model_spec
from mogul.spec.fingerprint import stamp_of_config
from mogul.spec.picks import BATCH_SIZES, SAMPLE_LIMIT
from mogul.spec.trace import ModelStamp, Trace, TraceMeta

Level = Literal["routing", "activations"]

_MAX_KEPT_LOGITS = 2**22
"""Above so many router logits a layer and forward, they are counted at once, not kept."""


@dataclass(frozen=True)
class Batch:
    """What the next forward holds, where it is not simply T real tokens of one task."""

    order: Int[np.ndarray, " N"]
    """Rows of the real tokens, in the order in which batches of the histograms take them."""
    task: Int[np.ndarray, " N"]
    """Task of each of them."""


class Tracer:
    """Counts what the experts of a model do while it is open (`with Tracer(model) as tracer`).

    `trace()` may be read at any time; `reset()` starts anew. `last_ids` and `last_weights` hold
    the picks [L, N, K] of the last forward.
    """

    level: Level

    def __init__(
        self,
        model: nn.Module,
        stamp: ModelStamp | None = None,
        *,
        level: Level = "routing",
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        sample_limit: int = SAMPLE_LIMIT,
        tasks: tuple[str, ...] = ("all",),
        seed: int = 0,
        salt: str = "",
    ) -> None:
        self.model, self.level, self.tasks, self.seed = model, level, tasks, seed
        config: Any = model.config
        values = config.to_dict()
        self.stamp = stamp or stamp_of_config(values, name=type(model).__name__)
        moe = model_spec(values).moe
        self.score = moe.router.score if moe else "softmax"
        self.batch_sizes, self.sample_limit, self.salt = batch_sizes, sample_limit, salt
        self.next_batch: Batch | None = None
        self.last_ids: Tensor | None = None
        self.last_weights: Tensor | None = None
        self.layers: tuple[int, ...] = ()
        self._seen: dict[int, Picks] = {}
        self._is_open = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.resume()
        self.reset()
        return self

    def __exit__(self, *_error: object) -> None:
        self.pause()

    def resume(self) -> None:
        """Put the hooks on; what was counted stays."""
        blocks = self._stack.enter_context(watch(self.model, self._see))
        self.layers = tuple(block.layer for block in blocks)
        if self.level == "activations":
            self._stack.enter_context(tap_experts(blocks, self._see_rows))
        self._stack.callback(self.model.register_forward_pre_hook(self._begin).remove)
        self._stack.callback(self.model.register_forward_hook(self._end).remove)

    def pause(self) -> None:
        """Take the hooks off; what was counted stays."""
        self._stack.close()

    def reset(self) -> None:
        """Forget everything counted so far."""
        device = next(self.model.parameters()).device
        experts = self.stamp.num_experts
        self.counts = RoutingCounts(
            len(self.layers),
            experts,
            device=device,
            batch_sizes=self.batch_sizes,
            num_tasks=len(self.tasks),
            score=self.score,
        )
        self.sample = TokenSample(self.sample_limit, seed=self.seed, salt=self.salt)
        self.sums = None
        if self.level == "activations":
            hidden = self.stamp.hidden_size
            self.sums = ActivationSums(len(self.layers), experts, hidden, device)

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        self._seen.clear()
        self._is_open = True

    @torch.no_grad()
    def _see(self, picks: Picks) -> None:
        if not self._is_open:
            return
        if picks.logits is not None and picks.logits.numel() > _MAX_KEPT_LOGITS:
            # A long prefill: count the scores at once, so that no layer's logits are kept.
            logits_TE = picks.logits
            if self.next_batch is not None:
                row_N = torch.from_numpy(self.next_batch.order).to(logits_TE.device)
                logits_TE = logits_TE[row_N]
            self.counts.add_scores(self.layers.index(picks.layer), logits_TE)
            picks = replace(picks, ids=picks.ids.to(torch.int16), logits=None)
        self._seen[picks.layer] = picks

    def _see_rows(
        self, position: int, x_TD: Tensor, ids_R: Tensor, weight_R: Tensor, y_RD: Tensor
    ) -> None:
        if not self._is_open or self.sums is None:
            return
        with torch.no_grad():
            picks = len(ids_R) // len(x_TD)
            is_real = (ids_R >= 0) & (ids_R < self.stamp.num_experts)
            ids_R = torch.where(is_real, ids_R, self.stamp.num_experts)
            if self.next_batch is not None:
                row_N = torch.from_numpy(self.next_batch.order).to(ids_R.device)
                slot_S = (
                    row_N[:, None] * picks + torch.arange(picks, device=row_N.device)
                ).flatten()
                x_TD, ids_R, weight_R = x_TD[row_N], ids_R[slot_S], weight_R[slot_S]
                y_RD = y_RD[slot_S]
            self.sums.add(position, x_TD, ids_R, weight_R.detach(), y_RD.detach())

    @torch.no_grad()
    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._is_open = False
        batch, self.next_batch = self.next_batch, None
        if missing := [layer for layer in self.layers if layer not in self._seen]:
            raise BackendError(
                f"the forward did not pass the layers {missing}",
                fix="trace a model that runs all its layers in a forward",
            )
        seen = [self._seen[layer] for layer in self.layers]
        self._seen.clear()
        ids = torch.stack([picks.ids for picks in seen])
        weights, logits = (_stacked([getattr(p, n) for p in seen]) for n in ("weights", "logits"))
        task_N = task = None
        if batch is not None:
            row_N = torch.from_numpy(batch.order).to(ids.device)
            task_N = batch.task
            task = torch.from_numpy(task_N).to(ids.device)
            ids, weights, logits = (
                None if one is None else one.index_select(1, row_N)
                for one in (ids, weights, logits)
            )
        assert ids is not None
        self.counts.add(ids, weights, logits, task)
        self.sample.add(ids, task_N)
        self.last_ids, self.last_weights = ids, weights

    def check_finite(self) -> None:
        """Raise MogulError naming the layers with NaN or infinite router scores or weights."""
        if bad := self.counts.bad_layers():
            layers = [self.layers[position] for position in bad]
            raise MogulError(
                f"the routers of the layers {layers} gave scores or weights that are not finite; "
                "their picks mean nothing",
                fix="check the weights of the checkpoint, or load it in another dtype",
            )

    def trace(self, *, is_complete: bool = True, data: tuple[str, ...] = ()) -> Trace:
        """The trace so far.

        Raises:
            MogulError: NaN or infinite router scores, naming the layers.
        """
        self.check_finite()
        arrays = self.counts.arrays()
        arrays |= self.sample.arrays(len(self.layers), self.stamp.top_k)
        if self.sums is not None:
            arrays |= self.sums.arrays()
        meta = TraceMeta(
            model=self.stamp,
            layers=self.layers,
            level=self.level,
            num_tokens=self.counts.num_tokens,
            batch_sizes=self.batch_sizes,
            sample_limit=self.sample_limit,
            tasks=self.tasks,
            data=data,
            seed=self.seed,
            is_complete=is_complete,
            versions=_versions(),
        )
        return Trace(meta, arrays)


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    if any(one is None for one in tensors):
        return None
    return torch.stack([one for one in tensors if one is not None])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("mogul", "torch", "transformers")}
