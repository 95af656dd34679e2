"""How many guesses pay: from measured acceptance and measured step times, for each batch size.

A step that asks for K guesses a request takes a time T(K) and gives E(K) = 1 + a1 + a1 a2 + ...
tokens a request, a_i the share of i-th guesses that were made and stood where the ones before them
did. The K with the best E(K) / T(K) is taken, and none where it does not beat plain decoding by a
margin: verifying reads more experts, so on a mixture of experts guesses often cost more than they
give. Times are taken in short runs of steps of one K, because a step behind one of another kind
takes another time; what is measured again later may cost half a hundredth of the time at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from mogul.core.errors import ConfigError

RUN = 8
"""Steps of one number of guesses in a row; the first is not measured."""

PAUSE = 16
"""Steps between two weighings: they take time themselves."""


@dataclass(frozen=True)
class SpeculationStats:
    """What guessing gave so far."""

    num_steps: int
    """Steps of a request in which something was guessed."""

    num_tokens: int
    """Tokens that these steps gave."""

    drafted: tuple[int, ...]
    """Guesses at each position."""

    accepted: tuple[int, ...]
    """Guesses at each position that stood."""

    def since(self, earlier: SpeculationStats) -> SpeculationStats:
        """What guessing gave after these counts were taken, of the same guesser."""
        return SpeculationStats(
            self.num_steps - earlier.num_steps,
            self.num_tokens - earlier.num_tokens,
            tuple(now - was for now, was in zip(self.drafted, earlier.drafted, strict=True)),
            tuple(now - was for now, was in zip(self.accepted, earlier.accepted, strict=True)),
        )

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of guesses at each position that stood."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True))

    @property
    def tokens_a_step(self) -> float:
        """Tokens a request gained in a step with guesses."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0


@dataclass
class _Bucket:
    """Step times of batches of one size (to a power of two), by number of guesses asked for."""

    times_s: dict[int, deque[float]] = field(default_factory=dict)
    measured: dict[int, int] = field(default_factory=dict)
    """Number of guesses -> steps of this bucket when it was last measured."""

    num_steps: int = 0

    chosen: int = 0
    left: int = RUN
    """Steps to go of a run that is being measured; it starts with plain decoding."""

    until_thought: int = 0
    """Steps until the numbers are weighed again."""

    spent_s: float = 0.0
    """Time of all steps."""

    probed_s: float = 0.0
    """`spent_s` at the end of the last run that was measured."""

    change_s: float = 0.0
    """What the last step took that asked for another number than the one before it."""


class DraftLength:
    """Chooses the number of guesses of the next step."""

    def __init__(
        self,
        most: int,
        *,
        margin: float = 1.05,
        probe_share: float = 0.005,
        memory: int = 21,
        fade: float = 0.995,
        fixed: bool = False,
    ) -> None:
        """Start knowing nothing.

        Args:
            most: guesses a request at most.
            margin: predicted gain over plain decoding below which nothing is guessed.
            probe_share: share of the time that trying other numbers again may cost.
            memory: step times kept of each batch size and number of guesses.
            fade: what a step leaves of the weight of older acceptances.
            fixed: always guess `most`.
        """
        if most < 1:
            raise ConfigError(f"{most} guesses are none", fix="leave speculation out")
        self.most = most
        self.margin = margin
        self.probe_share = probe_share
        self.memory = memory
        self.fade = fade
        self.fixed = fixed
        self._reached = [0.0] * most
        self._stood = [0.0] * most
        self._drafted = [0] * most
        self._accepted = [0] * most
        self._num_steps = self._num_tokens = 0
        self._buckets: dict[int, _Bucket] = {}
        self.agree: Callable[[list[float]], list[float]] | None = None
        """Turns this process's times into those of all ranks of an engine, which must choose alike;
        asked before every choice."""

    def choose(self, batch: int) -> int:
        """Guesses a request in the next step of so many requests; asking changes nothing."""
        return self.most if self.fixed else self._bucket(batch).chosen

    def is_off(self, batch: int) -> bool:
        """Whether guesses were measured not to pay, and nothing is being measured now."""
        bucket = self._bucket(batch)
        return not self.fixed and bucket.chosen == 0 and bucket.left == 0

    def _bucket(self, batch: int) -> _Bucket:
        bucket = self._buckets.get(batch.bit_length())
        if bucket is None:
            bucket = self._buckets[batch.bit_length()] = _Bucket()
        return bucket

    def time(self, batch: int, asked: int, seconds: float) -> None:
        """Take in how long a step took in which each of so many requests asked for guesses."""
        bucket = self._bucket(batch)
        bucket.spent_s += seconds
        bucket.times_s.setdefault(asked, deque(maxlen=self.memory)).append(seconds)
        bucket.num_steps += 1
        bucket.measured[asked] = bucket.num_steps
        if not bucket.left:
            bucket.until_thought -= 1
            if bucket.until_thought <= 0:
                bucket.until_thought = PAUSE
                self._agree_on(bucket)
                bucket.chosen = self._best(bucket)
                self._try_again(bucket)
        elif asked == bucket.chosen:
            bucket.left -= 1
            if bucket.left == 1:  # the first step of the run was never timed
                self._agree_on(bucket)
                self._end_run(bucket)

    def time_change(self, batch: int, seconds: float) -> None:
        """Take in how long the first step took that asked for another number of guesses."""
        bucket = self._bucket(batch)
        bucket.spent_s += seconds
        bucket.change_s = seconds

    def _agree_on(self, bucket: _Bucket) -> None:
        """Replace what this rank measured by what all ranks take it for."""
        if self.agree is None:
            return
        counts = sorted(bucket.times_s)
        typical_s = [typical(bucket.times_s, count) for count in counts]
        *typical_s, bucket.spent_s, bucket.probed_s, bucket.change_s = self.agree(
            [*typical_s, bucket.spent_s, bucket.probed_s, bucket.change_s]
        )
        for count, seconds in zip(counts, typical_s, strict=True):
            bucket.times_s[count] = deque([seconds], maxlen=self.memory)

    def _end_run(self, bucket: _Bucket) -> None:
        """What to do after a run of one number: measure a longer one that may win, or settle."""
        bucket.left, bucket.probed_s = 0, bucket.spent_s
        known = max(bucket.times_s)
        longer = min(self.most, 2 * known or 1)
        if longer > known and (
            known == 0
            or self._expected(longer) * typical(bucket.times_s, 0)
            > self.margin * typical(bucket.times_s, known)
        ):
            bucket.chosen, bucket.left = longer, RUN
        else:
            bucket.chosen = self._best(bucket)

    def _best(self, bucket: _Bucket) -> int:
        speeds = self._speeds(bucket)
        best = max(speeds, key=lambda count: speeds[count])
        return best if best and speeds[best] >= self.margin * speeds[0] else 0

    def _try_again(self, bucket: _Bucket) -> None:
        """Measure the number measured longest ago, where that costs next to nothing."""
        oldest = min(bucket.measured, key=lambda count: bucket.measured[count])
        if oldest == bucket.chosen:
            return
        speeds = self._speeds(bucket)
        lost = max(0.0, 1 - speeds[oldest] / speeds[bucket.chosen])
        cost_s = RUN * typical(bucket.times_s, oldest) * max(lost, 0.1) + 2 * bucket.change_s
        if (bucket.spent_s - bucket.probed_s) * self.probe_share > cost_s:
            bucket.chosen, bucket.left = oldest, RUN

    def _speeds(self, bucket: _Bucket) -> dict[int, float]:
        times = bucket.times_s
        return {k: self._expected(k) / typical(times, k) for k in range(max(times) + 1)}

    def _expected(self, count: int) -> float:
        """Tokens a request gains with so many guesses; an untried position is like the last."""
        total, chain, share = 1.0, 1.0, 0.7
        for reached, stood in zip(self._reached[:count], self._stood[:count], strict=True):
            share = (stood + share) / (reached + 1)
            chain *= share
            total += chain
        return total

    def record(self, asked: Sequence[int], drafted: Sequence[int], gained: Sequence[int]) -> None:
        """Take in a step: guesses asked for, guesses made and tokens gained of each request."""
        self._reached = [self.fade * x for x in self._reached]
        self._stood = [self.fade * x for x in self._stood]
        for wanted, guesses, tokens in zip(asked, drafted, gained, strict=True):
            for i in range(min(wanted, tokens)):
                self._reached[i] += 1
                self._stood[i] += i < tokens - 1
            if not guesses:
                continue
            self._num_steps += 1
            self._num_tokens += tokens
            for i in range(guesses):
                self._drafted[i] += 1
                self._accepted[i] += i < tokens - 1

    @property
    def stats(self) -> SpeculationStats:
        """What guessing gave so far."""
        return SpeculationStats(
            self._num_steps, self._num_tokens, tuple(self._drafted), tuple(self._accepted)
        )


def typical(times_s: dict[int, deque[float]], count: int) -> float:
    """Median time of a step with so many guesses; between measured numbers, a straight line."""
    if count in times_s:
        return median(times_s[count])
    below = max(k for k in times_s if k < count)
    above = min(k for k in times_s if k > count)
    low, high = typical(times_s, below), typical(times_s, above)
    return low + (high - low) * (count - below) / (above - below)
