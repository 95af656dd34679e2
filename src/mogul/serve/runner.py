"""The model and its pages on one device: a flat row of tokens in, logits of the kept rows out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mogul.core.errors import BackendError, ConfigError
from mogul.core.log import say
from mogul.kernels.paged_attention import PAGED_ATTENTION, AttentionFacts
from mogul.serve import attention
from mogul.serve.attention import LayerCache, LayerShape, StepState, find_layers, running
from mogul.serve.beside import join_shared
from mogul.serve.borrow import borrow, give_back
from mogul.serve.counts import ExpertCounts
from mogul.serve.fuse import fuse_linears
from mogul.serve.garbage import set_aside
from mogul.serve.graphs import Ladder, compile_layers, rungs_up_to, try_ladder
from mogul.serve.inputs import Arena, Entry, Layout, StepInputs, layout_of
from mogul.serve.kv_scales import KvScales, scales_for
from mogul.serve.options import EngineOptions
from mogul.serve.routed import ExpertTap

if TYPE_CHECKING:
    from mogul.kernels.triton.flashinfer_paged import Plans

_numbers = itertools.count(attention.NOBODY + 1)
KV_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}


class Runner:
    """Runs steps; knows nothing of who asked."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_dtype: str = "auto",
        attention: str = "auto",
        fuse: bool = False,
        count_experts: bool = False,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise ConfigError(f"KV dtype {kv_dtype!r} is unknown", fix=f"use {list(KV_DTYPES)}")
        self.model = model
        self.device = model.device
        head: Any = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        self.vocab_size = int(head.out_features if weight is None else weight.shape[0])
        self.kv_dtype = KV_DTYPES[kv_dtype]
        self.attention = attention
        self.plans: Plans | None = None
        self.caches: list[LayerCache] = []
        self.page_size = 0
        self.number = next(_numbers)
        self.tap = ExpertTap(model, self.number)
        self.ladder: Ladder | None = None
        self.counts: ExpertCounts | None = None
        self.is_compiled = False
        self._collect_again: Callable[[], object] = lambda: None
        borrow(model, self)
        try:
            model.eval().requires_grad_(False)
            if fuse:
                fuse_linears(model, self.device)
                join_shared(model, self.device)
            if count_experts:
                self.counts = ExpertCounts(model, self.device, self.number)
            self.shapes: list[LayerShape] = find_layers(model, self.device)
        except BaseException:
            self.close()
            raise

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(shape.elements * self._dtype(shape).itemsize for shape in self.shapes)

    def _dtype(self, shape: LayerShape) -> torch.dtype:
        return self.kv_dtype or shape.dtype

    def make_room(
        self, limits: Layout, num_pages: int, page_size: int, scales: KvScales | None = None
    ) -> None:
        """Allocate the pages, fp8 ones with scales, and the arenas of steps up to `limits`.

        Raises:
            ConfigError: scales of another model, or for pages that are not fp8.
        """
        if scales is not None and self.kv_dtype is None:
            raise ConfigError(
                "scales are given for a cache of the model's own dtype",
                fix='open it with kv_dtype="fp8", or leave them out',
            )
        self.page_size = page_size
        self.plans = self._plans(limits, page_size)
        self.arena = Arena(limits, self.device)
        self.last_ids = torch.zeros(limits.rows, dtype=torch.int64, device=self.device)
        factors = scales_for(self.shapes, scales, self.device) if self.kv_dtype else repeat(())
        for shape, pair in zip(self.shapes, factors, strict=False):
            size = (num_pages, page_size, shape.num_kv_heads, shape.width)
            kind = {"dtype": self._dtype(shape), "device": self.device}
            pages = (torch.zeros(size, **kind), torch.zeros(size, **kind))
            self.caches.append(LayerCache(*pages, *pair))

    def _plans(self, limits: Layout, page_size: int) -> Plans | None:
        """Room for the plans of attention by a backend that has some."""
        if self.attention != "flashinfer":
            return None
        for shape in self.shapes:  # refuse here, not in the first step
            cache = self._dtype(shape)
            heads = (shape.num_heads, shape.num_kv_heads, shape.width)
            facts = AttentionFacts(self.device, shape.dtype, cache, *heads, page_size)
            if reason := PAGED_ATTENTION.reasons(**facts._asdict())[self.attention]:
                raise BackendError(
                    f"FlashInfer cannot attend here: {reason}", fix='leave attention at "auto"'
                )
        from mogul.kernels.triton.flashinfer_paged import Plans

        pages = max(limits.pages, -(-limits.tokens // page_size))
        return Plans(self.device, page_size, limits.sequences, pages)

    def want_picks(self) -> None:
        """Keep the picks of every step from now on.

        Raises:
            ConfigError: steps are compiled or captured, which hides them.
        """
        if not self.tap.is_open and (self.is_compiled or self.ladder is not None):
            raise ConfigError(
                "this engine's steps are compiled, so picks cannot be read",
                fix="open it with record_experts=True",
            )
        self.tap.open()

    def read_counts(self) -> np.ndarray:
        """Tokens that each expert of each layer got, [layers, E]; waits for the device.

        Raises:
            ConfigError: nobody counts.
        """
        if self.counts is None:
            raise ConfigError("this engine does not count", fix="open it with count_experts=True")
        return self.counts.read()

    def warm_up(self, options: EngineOptions, limits: Layout, guesses: int = 0) -> None:
        """Compile and capture, on accelerators; the first step then takes no longer than others.

        Args:
            options: whether to.
            limits: the largest step.
            guesses: guessed tokens a request that decode steps may verify.
        """
        if self.device.type == "cpu":
            return
        if options.compile and not self.tap.is_open:
            self.is_compiled = bool(compile_layers(self.model))
        start_s = time.perf_counter()
        for tokens in (limits.tokens, limits.sequences):
            layout = replace(limits, tokens=tokens, rows=1, max_query_len=tokens)
            with torch.inference_mode():
                self.forward(self.send((), layout, {}))
        torch.accelerator.synchronize(self.device)
        say(f"first steps in {time.perf_counter() - start_s:.1f} s")
        if options.graphs and not self.tap.is_open:
            most = limits.sequences
            rungs = [size for size in options.graph_sizes if size <= most] or rungs_up_to(most)
            prompts = options.captured_prompts
            self.ladder = try_ladder(self, rungs, limits, guesses, prompts, tune=options.tune)
        self._collect_again = set_aside(self.device, self)

    @torch.inference_mode()
    def run(self, entries: Sequence[Entry], last_row: dict[int, int]) -> Tensor:
        """Compute a step: logits [R, V] of the rows its entries want, in their order."""
        ladder = self.ladder
        if ladder is not None and (rung := ladder.rung_of(entries)) is not None:
            self.send(entries, ladder.layout(rung), last_row, is_captured=True)
            return ladder.replay(rung, sum(entry.rows for entry in entries))
        layout = layout_of(entries, self.page_size)
        return self.forward(self.send(entries, layout, last_row))

    def send(
        self,
        entries: Sequence[Entry],
        layout: Layout,
        last_row: dict[int, int],
        *,
        is_captured: bool = False,
    ) -> StepInputs:
        """Move a step's numbers to the device; plan its attention where that needs a plan."""
        inputs = self.arena.send(entries, layout, self.page_size, last_row)
        if self.plans is not None:
            there = self.arena.sent(layout)
            numbers = (there.starts, there.lengths_S, there.tables_SB)
            captured = (layout, layout.tokens) if is_captured else None
            self.plans.begin(numbers, layout.max_query_len, captured)
        return inputs

    def forward(self, inputs: StepInputs) -> Tensor:
        """The module itself, through Transformers' own forward."""
        model: Any = self.model
        planned = nullcontext() if self.plans is None else self.plans.running()
        with running(self._state(inputs)), planned:
            out = model(
                input_ids=self.ids(inputs)[None],
                position_ids=inputs.positions_T[None],
                use_cache=False,
                logits_to_keep=inputs.keep_R if inputs.layout.rows else 1,
            )
        return out.logits[0, : inputs.layout.rows]

    def ids(self, inputs: StepInputs) -> Tensor:
        """Token ids; those of the step before are read where it left them."""
        if self.arena.is_shared:
            return inputs.ids_T
        taken_T = self.last_ids[inputs.source_T.clamp(min=0)]
        return torch.where(inputs.source_T < 0, inputs.ids_T, taken_T)

    def _state(self, inputs: StepInputs) -> StepState:
        return StepState(
            slots_T=inputs.slots_T,
            tables_SB=inputs.tables_SB,
            starts=inputs.starts,
            lengths_S=inputs.lengths_S,
            max_query_len=inputs.layout.max_query_len,
            caches=self.caches,
            kinds=inputs.layout.kinds,
            backend=self.attention,
            owner=self.number,
        )

    def close(self) -> None:
        """Give back pages, graphs and hooks; the last runner also the model's own attention."""
        give_back(self.model, self)
        self._collect_again()
        self.tap.close()
        if self.counts is not None:
            self.counts.close()
        self.ladder = self.plans = None
        self.caches = []

    def keep_ids(self, ids_R: Tensor) -> None:
        """Leave a step's tokens on the device for the next step."""
        if not self.arena.is_shared:
            self.last_ids[: len(ids_R)].copy_(ids_R)
