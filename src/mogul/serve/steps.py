"""One step from plan to tokens: what fails is cut in halves until only the guilty request fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mogul.core.log import log
from mogul.schedule.policy import StepPlan
from mogul.serve.inputs import Entry
from mogul.serve.params import SamplingRow
from mogul.serve.requests import Live
from mogul.serve.runner import Runner
from mogul.serve.sampling import Sampled, Sampler, SamplingBatch, with_logprobs
from mogul.serve.speculate import count_tokens, draft_rows


@dataclass
class Piece:
    """Results of requests that were computed together; on the way to the host."""

    entries: Sequence[Entry]
    sampled: Sampled
    """One row for each entry that wants logits, in their order."""

    prompt: Sampled | None
    """Rows of prompt tokens whose log-probabilities are asked for."""

    picks_TLK: Tensor | None
    counts: list[int] | None = None
    """Drawn tokens of each entry that stand, where tokens were guessed."""

    def draws(self) -> Iterator[tuple[Live, range]]:
        """Each request that drew, with its rows of `sampled` that stand."""
        at = number = 0
        for entry in self.entries:
            if entry.draws:
                stands = self.counts[number] if self.counts is not None else entry.draws
                yield entry.request, range(at, at + stands)
                at += entry.draws
                number += 1

    def count(self) -> None:
        """Find which guesses stand, all of them known by now."""
        if any(entry.drafts for entry in self.entries):
            drafts = [
                entry.request.draft_ids[: len(entry.drafts)]
                for entry in self.entries
                if entry.draws
            ]
            self.counts = count_tokens(self.sampled.ids.tolist(), drafts)


@dataclass
class Flight:
    """A launched step whose results are not read yet."""

    plan: StepPlan[Live]
    pieces: list[Piece]
    failed: list[tuple[Live, str]] = field(default_factory=list)
    landed: torch.Event | None = None
    is_counted: bool = False
    """Whether it held guesses: the next step then needs its tokens on the host."""

    def wait(self) -> None:
        """Until the results are on the host."""
        if self.landed is not None:
            self.landed.synchronize()

    def count_tokens(self) -> dict[int, int]:
        """Tokens that each decoding request gains, its right guesses included."""
        self.is_counted = True
        for piece in self.pieces:
            piece.count()
        found = {live.id: len(rows) for piece in self.pieces for live, rows in piece.draws()}
        return {live.id: found[live.id] for live in self.plan.decodes}


def entries_of(plan: StepPlan[Live]) -> list[Entry]:
    """What every planned request computes and which logits it wants."""
    entries = []
    for live in plan.decodes:
        drafts = tuple(live.draft_ids[: live.drafts])
        count = 1 + len(drafts)
        entries.append(Entry(live, live.computed, count, count, count, drafts))
    for live, count in plan.prompts:
        draws = int(live.computed + count >= live.goal)
        whole = live.params.prompt_logprobs is not None and not live.output_ids
        entries.append(Entry(live, live.computed, count, count if whole else draws, draws))
    return entries


class Steps:
    """Launches steps on a runner."""

    def __init__(self, runner: Runner, *, divides: bool = True) -> None:
        self.runner = runner
        self.divides = divides
        """Whether a failing step is cut in halves; ranks of one engine cannot each do so alone."""

        self.sampler = Sampler()
        self.observer: Callable[[Sequence[Entry]], None] | None = None
        """Told what was computed, while its results still lie on the device."""

        self.follower: Callable[[Tensor], None] | None = None
        """Given the drawn tokens of a step computed whole, still on the device, once their copy is
        on its way."""

        self._row_of_last: dict[int, int] = {}

    def launch(self, plan: StepPlan[Live]) -> Flight:
        """Compute and sample a planned step; requests that cannot be computed are `failed`."""
        flight = Flight(plan, [])
        self._try(entries_of(plan), flight)
        self._leave_tokens(flight)
        drawn_R = flight.pieces[0].sampled.ids if len(flight.pieces) == 1 else None
        if self.runner.device.type != "cpu":
            flight.pieces = [_to_host(piece) for piece in flight.pieces]
            flight.landed = torch.Event(self.runner.device)
            flight.landed.record()
        if self.follower is not None and drawn_R is not None:
            self.follower(drawn_R)
        return flight

    def _try(self, entries: Sequence[Entry], flight: Flight) -> None:
        try:
            flight.pieces.append(self._compute(entries))
            return
        except Exception as error:  # whatever it is, the other requests go on
            if not self.divides:
                raise
            reason = f"{type(error).__name__}: {error}"
        if len(entries) == 1:
            log.error(f"request {entries[0].request.id} failed: {reason}")
            flight.failed.append((entries[0].request, reason))
            return
        if self.runner.device.type != "cpu":
            torch.accelerator.empty_cache()
        log.warning(f"a step of {len(entries)} requests failed ({reason}); trying halves")
        half = len(entries) // 2
        self._try(entries[:half], flight)
        self._try(entries[half:], flight)

    @torch.inference_mode()
    def _compute(self, entries: Sequence[Entry]) -> Piece:
        self.runner.tap.start()
        logits_RV = self.runner.run(entries, self._row_of_last)
        if self.observer is not None:
            self.observer(entries)
        picks_TLK = self.runner.tap.picks() if self.runner.tap.is_open else None
        chosen, before = _rows(entries)
        prompt = self._prompt_logprobs(logits_RV, entries, before) if before else None
        if len(chosen) < len(logits_RV):
            logits_RV = logits_RV[torch.tensor(chosen, dtype=torch.int64, device=logits_RV.device)]
        rows = [row for entry in entries if entry.draws for row in _sampling_rows(entry)]
        sampled = self.sampler.sample(logits_RV, SamplingBatch.build(rows)) if rows else _NOTHING
        return Piece(entries, sampled, prompt, picks_TLK)

    def _prompt_logprobs(
        self, logits_RV: Tensor, entries: Sequence[Entry], rows: list[int]
    ) -> Sampled:
        """Log-probabilities of the prompt tokens that stand behind these rows."""
        following: list[int] = []
        most = 0
        for entry in entries:
            live = entry.request
            if count := entry.rows - entry.draws:
                most = max(most, live.params.prompt_logprobs or 0)
                following += live.prompt_ids[entry.first + 1 : entry.first + 1 + count]
        device = logits_RV.device
        ids_R = torch.tensor(following, dtype=torch.int64, device=device)
        part_RV = logits_RV[torch.tensor(rows, dtype=torch.int64, device=device)]
        return with_logprobs(part_RV, ids_R, torch.ones_like(ids_R, dtype=torch.bool), most)

    def _leave_tokens(self, flight: Flight) -> None:
        """Remember where the next step finds the tokens of this one, before the host knows them."""
        owners = [e.request.id for piece in flight.pieces for e in piece.entries if e.draws]
        self._row_of_last = {owner: row for row, owner in enumerate(owners)}
        if owners:
            ids = [piece.sampled.ids for piece in flight.pieces if len(piece.sampled.ids)]
            self.runner.keep_ids(ids[0] if len(ids) == 1 else torch.cat(ids))


_NOTHING = Sampled(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))


def _rows(entries: Sequence[Entry]) -> tuple[list[int], list[int]]:
    """Rows of logits to draw from, and those that stand before a known prompt token."""
    chosen: list[int] = []
    before: list[int] = []
    at = 0
    for entry in entries:
        chosen += (at + row for row in entry.draws_from)
        before += range(at, at + entry.rows - entry.draws)
        at += entry.rows
    return chosen, before


def _sampling_rows(entry: Entry) -> list[SamplingRow]:
    live = entry.request
    known = live.output_ids
    row = SamplingRow(
        params=live.params,
        seed=live.seed,
        prompt_ids=live.prompt_ids,
        output_ids=known if len(known) == live.emitted else range(live.emitted),
        end_ids=tuple(live.end_ids),
        allowed_V=live.matcher.allowed() if live.matcher is not None else None,
    )
    return draft_rows(row, entry.drafts, live.matcher)


def _to_host(piece: Piece) -> Piece:
    return Piece(
        piece.entries,
        _sampled_to_host(piece.sampled),
        None if piece.prompt is None else _sampled_to_host(piece.prompt),
        None if piece.picks_TLK is None else _copy(piece.picks_TLK),
    )


def _sampled_to_host(sampled: Sampled) -> Sampled:
    return Sampled(
        _copy(sampled.ids),
        _copy(sampled.is_valid),
        None if sampled.logprobs is None else _copy(sampled.logprobs),
        None if sampled.top_ids is None else _copy(sampled.top_ids),
        None if sampled.top_logprobs is None else _copy(sampled.top_logprobs),
    )


def _copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
