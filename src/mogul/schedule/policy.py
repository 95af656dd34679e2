"""Continuous batching with chunked prompts, decided on plain numbers.

Every step: all requests that decode go first, one token each (or one and its drafts); what is left
of the token budget is given to prompts in order of arrival, in chunks. A request is admitted when
the cache has room for its prompt; when the cache runs full the youngest running request gives its
room back and is computed again later. No clock, no device, no tensor: who calls brings those.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mogul.core.errors import ConfigError


@dataclass(slots=True)
class Request:
    """One request and how far it is."""

    id: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    cached_prefix: int = 0
    """Prompt tokens found in the prefix cache: they hold room but need no computing."""

    computed: int = 0
    """Tokens in the cache that were computed (or found)."""

    emitted: int = 0
    """Output tokens so far."""

    num_preempted: int = 0

    @property
    def goal(self) -> int:
        """Tokens to compute before the next token can be emitted after an admission."""
        return self.prompt_tokens + self.emitted


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


@dataclass(slots=True)
class StepPlan:
    """What the next step computes."""

    decodes: list[Request] = field(default_factory=list)
    prompts: list[tuple[Request, int]] = field(default_factory=list)
    """Requests with the number of prompt tokens to compute."""

    preempted: list[Request] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.decodes and not self.prompts

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the step."""
        return sum(count for _, count in self.prompts)


class Scheduler:
    """State of one data-parallel copy: who waits, who is prompted, who decodes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.prompting: list[Request] = []
        self.decoding: list[Request] = []
        self.held_tokens = 0
        """Tokens in the cache."""

        self.num_preemptions = 0

    def add(self, request: Request) -> None:
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
        self.waiting.append(request)

    @property
    def num_running(self) -> int:
        """Requests with room in the cache."""
        return len(self.prompting) + len(self.decoding)

    def plan(self) -> StepPlan:
        """Choose the next step."""
        step = StepPlan()
        self._make_room(step)
        step.decodes = self.decoding
        if self.waiting or self.prompting:
            self._give_prompts(step)
        return step

    def _make_room(self, step: StepPlan) -> None:
        """Preempt the youngest until every decoding request has room for its tokens."""
        need = self.limits.tokens_a_decode
        while self.held_tokens + len(self.decoding) * need > self.limits.cache_tokens:
            pool = self.prompting or self.decoding
            victim = max(pool, key=lambda request: (request.arrival_s, request.id))
            pool.remove(victim)
            self.held_tokens -= victim.computed
            victim.computed = 0
            victim.num_preempted += 1
            self.num_preemptions += 1
            self.waiting.appendleft(victim)
            step.preempted.append(victim)

    def _give_prompts(self, step: StepPlan) -> None:
        growing = len(self.decoding) * self.limits.tokens_a_decode
        budget = self.limits.step_tokens - growing
        free = self.limits.cache_tokens - self.held_tokens - growing
        for request in self.prompting:
            count = self._chunk(step, request, min(budget, free))
            budget, free = budget - count, free - count
        while budget > 0 and self.waiting and not step.preempted:
            request = self.waiting[0]
            if self.num_running >= self.limits.sequences or not self._has_room(request):
                return
            self.waiting.popleft()
            self.prompting.append(request)
            request.computed = min(request.cached_prefix, request.goal - 1)
            self.held_tokens += request.computed
            free -= request.computed
            count = self._chunk(step, request, min(budget, free))
            budget, free = budget - count, free - count

    def _has_room(self, request: Request) -> bool:
        promised = sum(one.goal - one.computed for one in self.prompting) + len(self.decoding)
        free = self.limits.cache_tokens * (1 - self.limits.watermark) - self.held_tokens - promised
        return request.goal <= free or self.num_running == 0

    @staticmethod
    def _chunk(step: StepPlan, request: Request, most: int) -> int:
        count = max(0, min(most, request.goal - request.computed))
        if count:
            step.prompts.append((request, count))
        return count

    def finish(self, step: StepPlan) -> list[Request]:
        """Account for a computed step, one token a decoding request; returns who is done."""
        done = []
        self.held_tokens += len(step.decodes)
        for request in step.decodes:
            request.computed += 1
            request.emitted += 1
            if request.emitted >= request.output_tokens:
                done.append(request)
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
            self.held_tokens -= sum(request.computed for request in done)
            self.decoding = [one for one in self.decoding if one.emitted < one.output_tokens]
        return done
