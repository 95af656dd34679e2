"""Guesses of a small model with the same vocabulary.

It keeps keys and values in pages of its own under the engine's page numbers, so nothing about its
cache is scheduled: where the engine has a page for a token, so has the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.log import log
from mogul.serve.sampling import Sampler, SamplingBatch
from mogul.serve.speculate.proposer import Drafting, Proposer, Trails, guess_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mogul.serve.engine import Engine
    from mogul.serve.requests import Live
    from mogul.serve.runner import Runner

LARGE_DRAFT = 0.25
"""Share of the model's parameters above which a draft seldom pays."""


class DraftModelProposer(Proposer):
    """Lets a small model say the next tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        from mogul.serve.runner import Runner

        self.runner = Runner(model)
        self._sampler = Sampler()
        self._trails = Trails()
        self._step_tokens = 0

    def token_bytes(self, runner: Runner) -> int:
        """The draft model's own keys and values."""
        del runner
        return self.runner.token_bytes

    def work_bytes(self, runner: Runner, step_tokens: int, captured_tokens: int) -> int:
        """What a step takes beyond what the engine's leave free again, and captured ones."""
        from mogul.serve.sizes import work_bytes_a_token

        own = work_bytes_a_token(self.runner)
        more = max(0, own - work_bytes_a_token(runner))
        return step_tokens * more + captured_tokens * own

    def attach(self, engine: Engine) -> None:
        """Allocate pages like the engine's and warm up.

        Raises:
            ConfigError: the vocabularies differ.
        """
        if self.runner.vocab_size != engine.runner.vocab_size:
            raise ConfigError(
                f"the draft model knows {self.runner.vocab_size} tokens, the model "
                f"{engine.runner.vocab_size}: a guess would mean something else",
                fix="take a draft with the same tokenizer",
            )
        own, whole = self.runner.model.num_parameters(), engine.runner.model.num_parameters()
        if own > LARGE_DRAFT * whole:
            log.warning(f"the draft has {own / whole:.0%} of the model's size: it will seldom pay")
        sizes = engine.sizes
        self.runner.make_room(sizes.largest_step, sizes.num_pages, sizes.page_size)
        self._step_tokens = sizes.largest_step.tokens
        self.runner.warm_up(engine.options, sizes.largest_step)

    def propose(self, requests: Sequence[Drafting], counts: Sequence[int]) -> list[list[int]]:
        """See `Proposer`."""
        from mogul.serve.inputs import Entry

        live = cast("Sequence[Live]", requests)
        guesses: list[list[int]] = [[] for _ in live]
        logits_SV = self._catch_up(live)
        asked = list(range(len(live)))
        while True:
            rows = [guess_row(live[i], guesses[i]) for i in asked]
            drawn = self._sampler.sample(logits_SV, SamplingBatch.build(rows)).ids.tolist()
            for i, token in zip(asked, drawn, strict=True):
                guesses[i].append(token)
            asked = [i for i in asked if len(guesses[i]) < counts[i]]
            if not asked:
                break
            logits_SV = self.runner.run(
                [
                    Entry(
                        live[i],
                        len(live[i].tokens) + len(guesses[i]) - 1,
                        1,
                        1,
                        1,
                        (guesses[i][-1],),
                    )
                    for i in asked
                ],
                {},
            )
        for one, guessed in zip(live, guesses, strict=True):
            self._trails.leave(one, len(one.tokens), guessed[:-1])
        return guesses

    def _catch_up(self, requests: Sequence[Live]) -> Tensor:
        """Compute what is known of every request and not in the pages: logits of its last token."""
        from mogul.serve.inputs import Entry

        found: list[Tensor] = []
        entries: list[Entry] = []
        room = self._step_tokens
        for request in requests:
            first, stop = self._trails.valid(request, len(request.tokens) - 1), len(request.tokens)
            while first < stop:
                count = min(stop - first, room)
                is_last = int(first + count == stop)
                entries.append(Entry(request, first, count, is_last, is_last))
                first, room = first + count, room - count
                if room == 0:
                    found.append(self.runner.run(entries, {}).clone())
                    entries, room = [], self._step_tokens
        if entries:
            found.append(self.runner.run(entries, {}))
        return found[0] if len(found) == 1 else torch.cat(found)

    def forget(self, request_id: int) -> None:
        """A request ended."""
        self._trails.forget(request_id)

    def close(self) -> None:
        """Give the pages back."""
        self.runner.close()
