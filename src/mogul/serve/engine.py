"""The engine: requests in, tokens out, many at once, on one machine and in one process.

It holds the loop and nothing else: the policy decides what runs (`mogul.schedule`), `steps`
computes it, `results` tells what came of it. On an accelerator a step is launched before the one
before it is read, so the host prepares the next step while the device runs; requests whose next
token depends on what the last one was (penalties, structure) and guesses make it wait.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogul.core.errors import ConfigError
from mogul.models.load import named_device
from mogul.schedule.policy import Limits, Scheduler, StepPlan
from mogul.serve.admit import PROMPT_ROWS, Prompt, as_ids, check_request, end_ids
from mogul.serve.blocks import BlockPool, root_digest
from mogul.serve.callers import Callers
from mogul.serve.kv_scales import KvScales
from mogul.serve.loading import Load, open_tokenizer, open_with_scales
from mogul.serve.options import EngineOptions
from mogul.serve.params import SamplingParams
from mogul.serve.ranks import check_spread, settle_options, settle_sizes, spread
from mogul.serve.requests import Chunk, Live
from mogul.serve.results import take
from mogul.serve.runner import Runner
from mogul.serve.sizes import choose_sizes
from mogul.serve.steps import Flight, Steps
from mogul.serve.stops import TextStream
from mogul.serve.structured import Matchers
from mogul.serve.tables import PageRoom

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mogul.serve.speculate import Speculator
    from mogul.spec.parallel import Parallel


@dataclass(frozen=True)
class Stats:
    """What an engine has done so far."""

    num_steps: int
    prompt_tokens: int
    """Prompt tokens computed, known ones not counted."""

    output_tokens: int
    num_preemptions: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""

    num_running: int
    num_waiting: int
    free_pages: int
    cached_pages: int
    num_pages: int


class Engine(Callers):
    """Generates for many requests at once; every method may be called from any thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        options: EngineOptions | None = None,
        *,
        name: str = "",
        speculator: Speculator | None = None,
        kv_scales: KvScales | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        super().__init__()
        self.options = options or EngineOptions()
        self.tokenizer = tokenizer
        self.parallel = parallel
        if parallel is not None:
            heads = spread(model, parallel, speculator)
            kv_scales = None if kv_scales is None else kv_scales.of_rank(*heads)
            self.options = settle_options(self.options, model.device)
        fuse = self.options.fuse and model.device.type != "cpu"
        kinds = {"kv_dtype": self.options.kv_dtype, "attention": self.options.attention}
        counts = self.options.count_experts
        self.runner = Runner(model, **kinds, fuse=fuse, count_experts=counts)
        try:
            self._open(model, name, speculator, kv_scales)
        except BaseException:
            if speculator is not None:
                speculator.close()
            self.runner.close()
            raise

    def _open(
        self,
        model: PreTrainedModel,
        name: str,
        speculator: Speculator | None,
        scales: KvScales | None,
    ) -> None:
        self.sizes = sizes = choose_sizes(self.runner, self.options, speculator)
        if self.parallel is not None:
            self.sizes = sizes = settle_sizes(sizes, model.device)
        self.runner.make_room(sizes.largest_step, sizes.num_pages, sizes.page_size, scales)
        self.pool = BlockPool(sizes.num_pages, sizes.page_size, reuse=self.options.reuse_prefix)
        self.room = PageRoom(self.pool, sizes.pages_a_table)
        limits = Limits(sizes.step_tokens, sizes.max_sequences, sizes.num_pages * sizes.page_size)
        self.scheduler: Scheduler[Live] = Scheduler(limits, self.room)
        self.steps = Steps(self.runner, divides=self.parallel is None)
        self.last_picks: Any = None
        """Picks of the last step read, where `record_experts` is on: a list of [T, layers, K] (or
        None), one for each part that was computed alone; only a failing step has more than one."""

        self.speculator = speculator
        self._matchers: Matchers | None = None
        self._salt = (name, str(model.dtype), self.options.kv_dtype)
        self._end_ids = end_ids(model, self.tokenizer)
        self._live: dict[int, Live] = {}
        self._flight: Flight | None = None
        self._ids = itertools.count()
        self._seeds = random.Random(self.options.seed)
        self._is_closed = False
        self._num_steps = self._prompt_tokens = self._output_tokens = 0
        if self.options.record_experts:
            self.runner.tap.open()
        guesses = 0
        if speculator is not None:
            speculator.attach(self)
            self.steps.observer, self.steps.follower = speculator.observe, speculator.follow
            guesses = speculator.length.most
        self.runner.warm_up(self.options, sizes.largest_step, guesses)
        if speculator is not None:
            speculator.warm_up()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        experts: str = "mogul",
        load: Load = "checkpoint",
        quantise: str | None = None,
        statistics: str | Path | None = None,
        speculator: Speculator | None = None,
        parallel: Parallel | None = None,
        **options: Any,
    ) -> Engine:
        """Open a checkpoint folder or hub id.

        Args:
            path: a folder with `config.json`, weights and a tokenizer (which may lack).
            dtype: "auto" (as stored), or a dtype or its name.
            device: None is an accelerator where there is one.
            experts: implementation of the experts.
            load: "random" makes weights of the config's shape on the device instead.
            quantise: fp8 (experts and linear layers), fp8-all (the output head in 8 bits too),
                fp8-experts, int4-32, -64 or -128 (experts): each layer is quantised while it is
                loaded. None keeps the weights as they are.
            statistics: file or folder of `mogul calibrate`; None takes what lies beside the
                weights, if anything.
            speculator: guesses tokens that are verified together; None guesses nothing.
            parallel: spread the model over this many ranks, each of which makes the same calls.
            options: fields of `EngineOptions`.

        Raises:
            ArtifactError: the checkpoint is damaged.
            BackendError: the family's attention cannot be given pages.
        """
        settled = EngineOptions(**options)
        if parallel is not None:
            check_spread(parallel, speculator, quantise)
        model, scales = open_with_scales(
            path,
            kv_dtype=settled.kv_dtype,
            load=load,
            dtype=dtype,
            device=named_device(device),
            experts=experts,
            quantise=quantise,
            statistics=statistics,
        )
        tokenizer = open_tokenizer(path)
        more = {"speculator": speculator, "kv_scales": scales, "parallel": parallel}
        return cls(model, tokenizer, settled, name=str(path), **more)

    # ------------------------------------------------------------------------------ requests

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: str = "",
    ) -> int:
        """Queue a request and return its id.

        What is said for it is kept until `take` fetches it, also when `step` returned it.

        Args:
            prompt: text, or token ids.
            params: how its tokens are chosen.
            priority: lower goes first and gives way last.
            salt: only requests with the same salt share pages.

        Raises:
            ConfigError: the prompt is empty, too long, or asks for what this engine lacks, or the
                engine is closed.
        """
        params = params or SamplingParams()
        ids = self.encode(prompt)
        with self._lock:
            self._check_open()
            check_request(ids, params, priority, self)
            number = next(self._ids)
            live = Live(
                number,
                len(ids),
                params.max_tokens,
                arrival_s=time.perf_counter(),
                priority=priority,
                params=params,
                prompt_ids=ids,
                seed=self._seeds.getrandbits(62) if params.seed is None else params.seed,
                root=root_digest(*self._salt, salt),
                tokens=list(ids),
                end_ids=self._ends(params),
                most_chunk=PROMPT_ROWS if params.prompt_logprobs is not None else 0,
            )
            self._equip(live)
            self.scheduler.add(live)
            self._live[number] = live
            self._mail[number] = deque()
            return number

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, as they stand or through the tokenizer."""
        return as_ids(prompt, self.tokenizer)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this engine is closed", fix="open another on the same model")

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        own = frozenset() if params.ignore_eos else self._end_ids
        return own | frozenset(params.stop_token_ids)

    def _equip(self, live: Live) -> None:
        """Give a request what its text and its structure need."""
        if self.tokenizer is not None:
            live.stream = TextStream(self.tokenizer, live.params)
        if live.params.structure is not None:
            live.matcher = self._make_matchers().matcher(live.params.structure)
        if live.params.routed_experts:
            self.runner.want_picks()

    def _make_matchers(self) -> Matchers:
        if self._matchers is None:
            if self.tokenizer is None:
                raise ConfigError("structured answers need a tokenizer")
            self._matchers = Matchers(self.tokenizer, self.runner.vocab_size, self._end_ids)
        return self._matchers

    def abort(self, number: int) -> bool:
        """End a request now; its pages are free before the next step. False if it had ended."""
        with self._lock:
            live = self._live.get(number)
            if live is None or live.finish is not None:
                return False
            live.finish = "abort"
            self._end(live, Chunk(number, "", ()))
            return True

    # ---------------------------------------------------------------------------------- loop

    @property
    def has_work(self) -> bool:
        """Whether any request waits, runs or is not read yet."""
        return bool(self._live) or self._flight is not None

    def step(self) -> list[Chunk]:
        """Run one step; returns what it gave to whom, and posts it to their streams.

        One that is broken off (Ctrl-C above all) is done again by the next call.
        """
        with self._lock:
            self._check_open()
            try:
                return self._step()
            except BaseException:
                self._begin_again()
                raise

    def _step(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        if self._flight is not None and not self._may_overlap():
            chunks += self._land()
        plan = self._plan()
        before = self._flight
        self._flight = None if plan.is_empty else self._launch(plan)
        if before is not None:
            chunks += self._read(before)
        if self._flight is not None and not self._may_overlap():
            chunks += self._land()
        return chunks

    def _begin_again(self) -> None:
        """Everybody goes on from the tokens that were told; what is in flight is not waited for."""
        self._flight = None
        self.scheduler.begin_again(list(self.room.running.values()))
        for live in list(self._live.values()):
            live.emitted = len(live.output_ids)
            if live.finish is not None:
                self._end(live, Chunk(live.id, "", ()))

    def _may_overlap(self) -> bool:
        if self.runner.device.type == "cpu":
            return False
        decoding = self.scheduler.decoding
        if self.speculator is not None and self.speculator.next_count(len(decoding)):
            return False
        if self._flight is not None and (self._flight.failed or self._flight.is_counted):
            return False
        running = itertools.chain(self.scheduler.prompting, self.scheduler.decoding)
        return not any(live.needs_results for live in running)

    def _plan(self) -> StepPlan[Live]:
        """Choose the next step, with guesses where they pay."""
        speculator = self.speculator
        if speculator is None:
            return self.scheduler.plan()
        speculator.wish(self.scheduler.decoding)
        plan = self.scheduler.plan()
        speculator.guess(plan.decodes)
        return plan

    def _launch(self, plan: StepPlan[Live]) -> Flight:
        flight = self.steps.launch(plan)
        for live, _ in flight.failed:
            plan.decodes = [one for one in plan.decodes if one is not live]
            plan.prompts = [(one, count) for one, count in plan.prompts if one is not live]
        self._num_steps += 1
        self._prompt_tokens += plan.prompt_tokens
        self.scheduler.advance(plan, self._verify(flight))
        return flight

    def _verify(self, flight: Flight) -> dict[int, int] | None:
        """Count the guesses that stood; waits for the step. None where none were asked for."""
        speculator, decodes = self.speculator, flight.plan.decodes
        if speculator is None or not speculator.asked:
            return None
        flight.wait()
        speculator.settle(decodes)
        counts = flight.count_tokens()
        speculator.learn(decodes, [counts[one.id] for one in decodes])
        return counts

    def _land(self) -> list[Chunk]:
        flight, self._flight = self._flight, None
        return self._read(flight) if flight is not None else []

    def _read(self, flight: Flight) -> list[Chunk]:
        chunks = []
        for live, chunk in take(flight):
            self._output_tokens += len(chunk.token_ids)
            if live.finish is not None:
                chunk = self._end(live, chunk)
            else:
                self.room.learn(live)
                self._mail[live.id].append(chunk)
            chunks.append(chunk)
        if self.speculator is not None:
            plan = flight.plan
            self.speculator.timed(
                len(plan.decodes), is_pure=bool(plan.decodes and not plan.prompts)
            )
        if self.options.record_experts:
            self.last_picks = [piece.picks_TLK for piece in flight.pieces]
        return chunks

    def _end(self, live: Live, chunk: Chunk) -> Chunk:
        self.scheduler.drop(live)
        if self.speculator is not None:
            self.speculator.forget(live.id)
        del self._live[live.id]
        chunk = replace(chunk, answer=live.answer())
        self._mail[live.id].append(chunk)
        return chunk

    def close(self) -> None:
        """Abort everything and give the cache's memory back; the model stays usable.

        What was said until then can still be fetched with `take`; `add` and `step` then refuse.
        """
        with self._lock:
            if self._is_closed:
                return
            self._land()
            for number in list(self._live):
                self.abort(number)
            self._is_closed = True
            if self.speculator is not None:
                self.speculator.close()
            self.runner.close()

    @property
    def stats(self) -> Stats:
        """Counters since the start, and the state now."""
        with self._lock:
            return Stats(
                num_steps=self._num_steps,
                prompt_tokens=self._prompt_tokens,
                output_tokens=self._output_tokens,
                num_preemptions=self.scheduler.num_preemptions,
                cached_tokens=self.pool.hit_tokens,
                num_running=self.scheduler.num_running,
                num_waiting=len(self.scheduler.waiting),
                free_pages=self.pool.num_available - self.pool.num_cached,
                cached_pages=self.pool.num_cached,
                num_pages=self.pool.num_pages,
            )

    def expert_counts(self) -> np.ndarray:
        """Tokens that each expert of each layer got, [layers, E], where they are counted."""
        with self._lock:
            return self.runner.read_counts()

    def check(self) -> None:
        """Assert that no page is lost and no request forgotten (for tests)."""
        with self._lock:
            self.room.check()
            running = {live.id for live in self.scheduler.prompting + self.scheduler.decoding}
            landing = set(self.room.running) - running
            assert running <= set(self.room.running), "a running request has no room"
            assert landing <= set(self._live), "room is held for nobody"
