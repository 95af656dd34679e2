"""Continuous batching with chunked prompts, decided on plain numbers.

Every step: all requests that decode go first, one token each (or one and its drafts); what is left
of the token budget is given to prompts, in chunks, in order of priority and arrival. A request is
admitted when the cache has room for its prompt; when the cache runs full the least important,
youngest running request gives its room back and is computed again later. No clock, no device, no
tensor: who calls brings those, and the room (`room.py`).

A caller that knows nothing early calls `plan` and `finish`. One that prepares the next step while
the last one runs calls `advance` when it launches a step (tokens are counted before they are known)
and `drop` when it learns that a request ended.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mogul.core.errors import ConfigError
from mogul.schedule.room import Room, TokenRoom


@dataclass(slots=True, eq=False)
class Request:
    """One request and how far it is."""

    id: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    cached_prefix: int = 0
    """Prompt tokens found in the prefix cache: they hold room but need no computing."""

    priority: int = 0
    """Lower goes first, and gives way last."""

    drafts: int = 0
    """Guessed tokens to verify beside the next one, in the next step."""

    most_chunk: int = 0
    """Prompt tokens a step at most; 0 is no bound of its own."""

    computed: int = 0
    """Tokens in the cache that were computed (or found)."""

    emitted: int = 0
    """Output tokens so far."""

    num_preempted: int = 0

    @property
    def goal(self) -> int:
        """Tokens to compute before the next token can be emitted after an admission."""
        return self.prompt_tokens + self.emitted

    @property
    def rank(self) -> tuple[int, float, int]:
        """Order of service: the smallest goes first and gives way last."""
        return (self.priority, self.arrival_s, self.id)


R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Limits:
    """What one step and the cache can hold."""

    step_tokens: int = 8192
    """Tokens computed in one step, decode included."""

    sequences: int = 256
    """Requests running at once."""

    cache_tokens: int = 1_000_000
    """Tokens the cache holds, all requests together."""

    watermark: float = 0.01
    """Share of the cache kept free when a request is admitted."""

    tokens_a_decode: int = 1
    """Tokens a decoding request computes a step (drafts included)."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing ever runs."""
        for name in ("step_tokens", "sequences", "tokens_a_decode"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} {getattr(self, name)}: nothing runs", fix="give 1 or more"
                )
        if not 0 <= self.watermark < 1:
            raise ConfigError(
                f"watermark {self.watermark}: no share of the cache", fix="give 0 or more, below 1"
            )


@dataclass(slots=True)
class StepPlan(Generic[R]):
    """What the next step computes."""

    decodes: list[R] = field(default_factory=list)
    """Requests that compute their next token, and `drafts` more each."""

    prompts: list[tuple[R, int]] = field(default_factory=list)
    """Requests with the number of prompt tokens to compute."""

    preempted: list[R] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.decodes and not self.prompts

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the step."""
        return sum(count for _, count in self.prompts)


class Scheduler(Generic[R]):
    """State of one data-parallel copy: who waits, who is prompted, who decodes."""

    def __init__(self, limits: Limits, room: Room | None = None) -> None:
        self.limits = limits
        self.room: Room = room or TokenRoom(limits.cache_tokens, limits.watermark)
        self.waiting: list[R] = []
        """In order of service."""

        self.prompting: list[R] = []
        self.decoding: list[R] = []
        self.held_tokens = 0
        """Tokens in the cache."""

        self.num_preemptions = 0

    def add(self, request: R) -> None:
        """Queue a request.

        Raises:
            ConfigError: it could never run, even alone.
        """
        whole = request.prompt_tokens + request.output_tokens
        if whole > self.limits.cache_tokens:
            raise ConfigError(
                f"a request of {whole} tokens can never fit a cache of {self.limits.cache_tokens}",
                fix="shorten the request, or give the cache more memory",
            )
        insort(self.waiting, request, key=_rank)

    @property
    def num_running(self) -> int:
        """Requests with room in the cache."""
        return len(self.prompting) + len(self.decoding)

    def plan(self) -> StepPlan[R]:
        """Choose the next step."""
        step: StepPlan[R] = StepPlan()
        self._give_decodes(step)
        if self.waiting or self.prompting:
            self._give_prompts(step)
        return step

    def _give_decodes(self, step: StepPlan[R]) -> None:
        """Every decoding request gets room for its tokens, if need be from a lesser one."""
        fewest = self.limits.tokens_a_decode
        budget = max(self.limits.step_tokens, len(self.decoding) * fewest)
        spare = budget - len(self.decoding) * fewest
        fit, give = self.room.fit, step.decodes.append
        in_turn = sorted(self.decoding, key=_rank) if self._is_mixed() else self.decoding[:]
        for request in in_turn:
            if request.computed == 0:
                continue  # gave way to one before it
            drafts = request.drafts
            wanted = max(fewest, min(1 + drafts, fewest + spare)) if drafts else fewest
            while (fits := fit(request, wanted)) < fewest:
                victim = self._preempt(step)
                if victim is request:
                    break
            else:
                if drafts:
                    request.drafts = min(drafts, fits - 1)
                    spare -= max(0, request.drafts + 1 - fewest)
                give(request)

    def _is_mixed(self) -> bool:
        return any(one.priority for one in self.decoding)

    def _preempt(self, step: StepPlan[R]) -> R:
        """Send the least important running request back to wait."""
        running = [*self.prompting, *self.decoding]
        lowest = max(one.priority for one in running)
        pool = [one for one in self.prompting if one.priority == lowest]
        pool = pool or [one for one in self.decoding if one.priority == lowest]
        victim = max(pool, key=_rank)
        (self.prompting if victim in self.prompting else self.decoding).remove(victim)
        if victim in step.decodes:
            step.decodes.remove(victim)
        self._leave(victim)
        victim.num_preempted += 1
        self.num_preemptions += 1
        insort(self.waiting, victim, key=_rank)
        step.preempted.append(victim)
        return victim

    def _leave(self, request: R) -> None:
        self.held_tokens -= request.computed
        self.room.release(request)
        request.computed = request.drafts = 0

    def _give_prompts(self, step: StepPlan[R]) -> None:
        need = self.limits.tokens_a_decode
        budget = self.limits.step_tokens
        budget -= sum(max(need, 1 + request.drafts) for request in step.decodes)
        for request in self.prompting:
            budget -= self._chunk(step, request, budget)
        while budget > 0 and self.waiting and not step.preempted:
            request = self.waiting[0]
            if self.num_running >= self.limits.sequences:
                return
            if not self.room.admit(request, is_alone=self.num_running == 0):
                return
            self.waiting.pop(0)
            self.prompting.append(request)
            self.held_tokens += request.computed
            budget -= self._chunk(step, request, budget)

    def _chunk(self, step: StepPlan[R], request: R, most: int) -> int:
        count = max(0, min(most, request.most_chunk or most, request.goal - request.computed))
        count = self.room.fit(request, count) if count else 0
        if count:
            step.prompts.append((request, count))
        return count

    def advance(self, step: StepPlan[R], emitted: Mapping[int, int] | None = None) -> list[R]:
        """Count the tokens of a step; returns who has all its tokens, still holding its room.

        Args:
            step: what was planned.
            emitted: tokens by request id where a decode gave another number than one.
        """
        done: list[R] = []
        held_tokens = self.held_tokens
        for request in step.decodes:
            count = emitted.get(request.id, 1) if emitted else 1
            held_tokens += count
            request.computed += count
            request.emitted = known = request.emitted + count
            request.drafts = 0
            if known >= request.output_tokens:
                done.append(request)
        self.held_tokens = held_tokens
        for request, count in step.prompts:
            request.computed += count
            self.held_tokens += count
            if request.computed >= request.goal:
                request.emitted += 1  # the prompt's last position gives a token
                self.prompting.remove(request)
                if request.emitted >= request.output_tokens:
                    done.append(request)
                else:
                    self.decoding.append(request)
        if done:
            self.decoding = [one for one in self.decoding if one.emitted < one.output_tokens]
        return done

    def finish(self, step: StepPlan[R]) -> list[R]:
        """Account for a computed step, one token a decoding request; returns who is done."""
        done = self.advance(step)
        for request in done:
            self.held_tokens -= request.computed
            self.room.release(request)
        return done

    def begin_again(self, requests: Sequence[R]) -> None:
        """Send requests with room back to wait: a step was broken off, nobody knows how far."""
        for request in requests:
            self.drop(request)
            request.num_preempted += 1
            insort(self.waiting, request, key=_rank)
        self.held_tokens = 0

    def drop(self, request: R) -> None:
        """Remove a request wherever it stands: ended, aborted or failed."""
        for queue in (self.waiting, self.prompting, self.decoding):
            if request in queue:
                queue.remove(request)
                if queue is self.waiting:
                    return
                break
        self._leave(request)


def _rank(request: Request) -> tuple[int, float, int]:
    return request.rank
