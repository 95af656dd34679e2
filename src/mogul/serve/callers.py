"""Who waits for what an engine says: whole answers, streams, and what nobody has fetched yet.

Decides how a caller waits: it runs the engine's steps itself, unless another thread's step has said
something for it meanwhile. Whoever stops waiting leaves nothing behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence

from mogul.core.errors import ConfigError
from mogul.serve.admit import Prompt, as_prompts
from mogul.serve.door import Door
from mogul.serve.params import SamplingParams
from mogul.serve.requests import Answer, Chunk


class Callers(ABC):
    """The side of an engine that its callers wait at."""

    def __init__(self) -> None:
        self._lock = Door()
        self._mail: dict[int, deque[Chunk]] = {}
        """Chunks of every request, until they are taken."""

    @abstractmethod
    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request and return its id."""

    @abstractmethod
    def step(self) -> list[Chunk]:
        """Run one step, and post what it gave."""

    @abstractmethod
    def abort(self, number: int) -> bool:
        """End a request now. False if it had ended."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Answer]:
        """Answer prompts together; answers stand in the order of the prompts."""
        many = as_prompts(prompts)
        each = [params] * len(many) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(many):
            raise ConfigError(f"{len(many)} prompts, but {len(each)} sampling parameters")
        numbers: list[int] = []
        try:
            for prompt, one in zip(many, each, strict=True):
                numbers.append(self.add(prompt, one))
            answers = {number: self._finish(number) for number in numbers}
        finally:
            self._forget(numbers)
        return [answers[number] for number in numbers]

    def _finish(self, number: int) -> Answer:
        while True:
            for chunk in self.take(number):
                if chunk.answer is not None:
                    return chunk.answer
            self._go_on(number)

    def _go_on(self, number: int) -> None:
        """Step, unless another thread's step or `close` has posted something meanwhile."""
        with self._lock:
            if not self._mail.get(number):
                self.step()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Yield what is said as it is said; closing the iterator aborts the request."""
        number = self.add(prompt, params)
        try:
            while True:
                for chunk in self.take(number):
                    yield chunk
                    if chunk.answer is not None:
                        return
                self._go_on(number)
        finally:
            self._forget([number])

    def take(self, number: int) -> list[Chunk]:
        """What was said for a request since the last call, without a step."""
        with self._lock:
            mail = self._mail.get(number)
            if mail is None:
                return []
            chunks = list(mail)
            mail.clear()
            if chunks and chunks[-1].answer is not None:
                del self._mail[number]
            return chunks

    def _forget(self, numbers: Sequence[int]) -> None:
        """Abort what still runs of these requests and drop what nobody will read."""
        for number in numbers:
            self.abort(number)
            self._mail.pop(number, None)
