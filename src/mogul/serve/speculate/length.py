"""How many guesses pay: from measured acceptance and measured step times, for each batch size.

A step with K guesses a request takes a time T(K) and gives E(K) = 1 + a1 + a1 a2 + ... tokens a
request, a_i the share of i-th guesses that stood where the ones before them did. The K with the
best E(K) / T(K) is taken, and none where it does not beat plain decoding by a margin: verifying
reads more experts, so on a mixture of experts guesses often cost more than they give.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from mogul.core.errors import ConfigError


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
    """Step times of batches of one size (to a power of two), by number of guesses."""

    times_s: dict[int, deque[float]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    """Number of guesses -> step at which it was last measured."""

    num_steps: int = 0
    probed: int = 0
    """Step of the last probe."""


class DraftLength:
    """Chooses the number of guesses of the next step."""

    def __init__(
        self,
        most: int,
        *,
        margin: float = 1.05,
        probe_every: int = 200,
        memory: int = 9,
        fade: float = 0.995,
        fixed: bool = False,
    ) -> None:
        """Start knowing nothing.

        Args:
            most: guesses a request at most.
            margin: predicted gain over plain decoding below which nothing is guessed.
            probe_every: steps after which the number measured longest ago is tried again.
            memory: step times kept of each batch size and number of guesses.
            fade: what a step leaves of the weight of older acceptances.
            fixed: always guess `most`.
        """
        if most < 1:
            raise ConfigError(f"{most} guesses are none", fix="leave speculation out")
        self.most = most
        self.margin = margin
        self.probe_every = probe_every
        self.memory = memory
        self.fade = fade
        self.fixed = fixed
        self._reached = [0.0] * most
        self._stood = [0.0] * most
        self._drafted = [0] * most
        self._accepted = [0] * most
        self._num_steps = self._num_tokens = 0
        self._buckets: dict[int, _Bucket] = {}

    def choose(self, batch: int) -> int:
        """Guesses a request in the next step of so many requests."""
        if self.fixed:
            return self.most
        bucket = self._buckets.setdefault(batch.bit_length(), _Bucket())
        if (probe := self._probe(bucket)) is not None:
            return probe
        speeds = self._speeds(bucket)
        best = max(speeds, key=lambda count: speeds[count])
        return best if best and speeds[best] >= self.margin * speeds[0] else 0

    def _probe(self, bucket: _Bucket) -> int | None:
        """A length whose time must be measured before anything can be compared.

        First plain decoding, then one guess, then doubled lengths as long as they may still win.
        """
        for wanted in (0, 1):
            if len(bucket.times_s.get(wanted, ())) < 3:
                return wanted
        if bucket.num_steps - bucket.probed >= self.probe_every:
            bucket.probed = bucket.num_steps
            return min(bucket.last, key=lambda count: bucket.last[count])
        known = max(bucket.times_s)
        longer = min(self.most, 2 * known)
        if longer > known and self._expected(longer) * self.typical(bucket, 0) > self.margin * (
            self.typical(bucket, known)
        ):
            return longer
        return None

    def _speeds(self, bucket: _Bucket) -> dict[int, float]:
        longest = max(bucket.times_s)
        return {k: self._expected(k) / self.typical(bucket, k) for k in range(longest + 1)}

    def typical(self, bucket: _Bucket, count: int) -> float:
        """Median time of a step with so many guesses; between measured numbers, a straight line."""
        times = bucket.times_s
        if count in times:
            return median(times[count])
        below = max(k for k in times if k < count)
        above = min(k for k in times if k > count)
        low, high = median(times[below]), median(times[above])
        return low + (high - low) * (count - below) / (above - below)

    def _expected(self, count: int) -> float:
        """Tokens a request gains with so many guesses; an untried position is like the last."""
        total, chain, share = 1.0, 1.0, 0.7
        for reached, stood in zip(self._reached[:count], self._stood[:count], strict=True):
            share = (stood + share) / (reached + 1)
            chain *= share
            total += chain
        return total

    def record(self, drafted: Sequence[int], gained: Sequence[int]) -> None:
        """Take in a step: guesses and tokens gained of each request."""
        self._reached = [self.fade * x for x in self._reached]
        self._stood = [self.fade * x for x in self._stood]
        for guesses, tokens in zip(drafted, gained, strict=True):
            if not guesses:
                continue
            self._num_steps += 1
            self._num_tokens += tokens
            for i in range(guesses):
                self._drafted[i] += 1
                self._accepted[i] += i < tokens - 1
                self._reached[i] += i <= tokens - 1
                self._stood[i] += i < tokens - 1

    def time(self, batch: int, count: int, seconds: float) -> None:
        """Take in how long a step of so many requests with so many guesses each took."""
        bucket = self._buckets.setdefault(batch.bit_length(), _Bucket())
        bucket.times_s.setdefault(count, deque(maxlen=self.memory)).append(seconds)
        bucket.num_steps += 1
        bucket.last[count] = bucket.num_steps

    @property
    def stats(self) -> SpeculationStats:
        """What guessing gave so far."""
        return SpeculationStats(
            self._num_steps, self._num_tokens, tuple(self._drafted), tuple(self._accepted)
        )
