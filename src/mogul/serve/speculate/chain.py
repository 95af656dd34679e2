"""Guesses that never leave the device: counting what stood and guessing on, without the host.

After a step that verified guesses, `begin` compares the drawn tokens with the guesses, passes the
step's hidden states through the MTP layer and draws the first guess at each request's end; `go_on`
passes the layer's own output through it once more. Both read the numbers of the step where the
engine left them, so they are captured as graphs and launched before the host knows what was drawn:
it reads the step while the device guesses. The guesses stay behind the runner's last tokens, where
the next step finds its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mogul.serve.attention import LayerCache, StepState, running
from mogul.serve.graphs import MOST_GUESSING, capture_calls
from mogul.serve.inputs import Layout, StepInputs, layout_of

if TYPE_CHECKING:
    from mogul.serve.inputs import Entry
    from mogul.serve.runner import Runner


class Chain:
    """The MTP layer over and over, for up to `MOST_GUESSING` greedy requests."""

    def __init__(self, runner: Runner, cache: LayerCache, hidden_TD: Tensor, most: int) -> None:
        """Allocate what the captured calls share.

        Args:
            runner: of the model, its room made.
            cache: pages of the layer.
            hidden_TD: where the final norm leaves its output of every step.
            most: guesses a request at most.
        """
        self.runner, self.cache = runner, cache
        self._model: Any = runner.model
        self._hidden_TD = hidden_TD
        device = runner.device
        self.first_row = len(runner.last_ids)
        """Row of the runner's last tokens at which the guesses begin."""

        spare = torch.zeros(most * MOST_GUESSING, dtype=torch.int64, device=device)
        runner.last_ids = torch.cat((runner.last_ids, spare))
        self.guess_KS = runner.last_ids[self.first_row :].view(most, MOST_GUESSING)
        self._drawn_T = torch.zeros((most + 1) * MOST_GUESSING, dtype=torch.int64, device=device)
        self._state_SD = torch.zeros(
            MOST_GUESSING, hidden_TD.shape[1], dtype=hidden_TD.dtype, device=device
        )
        self._at_S = torch.zeros(MOST_GUESSING, dtype=torch.int64, device=device)
        self._last_S = torch.zeros(MOST_GUESSING, dtype=torch.int64, device=device)
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._starts = torch.arange(MOST_GUESSING + 1, dtype=torch.int32, device=device)
        self._host = [torch.zeros(most, MOST_GUESSING, dtype=torch.int64) for _ in range(2)]
        if device.type != "cpu":
            self._host = [host.pin_memory() for host in self._host]
        self._turn = 0
        self._calls: dict[tuple[int, int], Callable[[], None]] = {}

    def capture(self) -> None:
        """Capture the calls of every rung of the engine's ladder that verifies guesses."""
        if self.runner.ladder is not None:
            self._calls = capture_calls(self._to_capture(), self.runner.device)

    def _to_capture(self) -> Iterator[tuple[tuple[int, int], Callable[[], None]]]:
        """Each call behind its name, its numbers laid out when it is reached."""
        runner, ladder = self.runner, self.runner.ladder
        assert ladder is not None
        for sequences, width in ladder.rungs:
            if width > 1:
                layout = ladder.layout((sequences, width))
                inputs = runner.arena.send((), layout, runner.page_size, {})
                yield (sequences, width), partial(self.begin, inputs)
                if width == 2:
                    yield (sequences, 0), partial(self.go_on, inputs)

    def layout(self, entries: Sequence[Entry]) -> Layout | None:
        """How a step lies that may be followed; None where it may not be."""
        live = [entry.request for entry in entries]
        if len(live) > MOST_GUESSING or any(entry.count != entry.rows for entry in entries):
            return None
        if any(one.needs_results or not one.params.is_greedy for one in live):
            return None
        if self.runner.device.type == "cpu":
            return layout_of(entries, self.runner.page_size)
        ladder = self.runner.ladder
        rung = ladder.rung_of(entries) if ladder is not None else None
        if ladder is None or rung not in self._calls:
            return None
        return ladder.layout(rung)

    def run(self, layout: Layout, ids_R: Tensor, count: int) -> None:
        """Follow a step that lies so with `count` guesses for each of its requests."""
        self._drawn_T[: len(ids_R)].copy_(ids_R)
        inputs = self.runner.arena.views(layout)
        begin = self._calls.get((layout.sequences, layout.max_query_len))
        go_on = self._calls.get((layout.sequences, 0))
        (begin or partial(self.begin, inputs))()
        for _ in range(count - 1):
            (go_on or partial(self.go_on, inputs))()
        self._turn = 1 - self._turn
        self._host[self._turn].copy_(self.guess_KS, non_blocking=True)

    def guesses(self, sequence: int, count: int) -> list[int]:
        """The last run's guesses for the n-th request, each as a row that `told` reads later."""
        return [-1 - self.first_row - k * MOST_GUESSING - sequence for k in range(count)]

    @property
    def told(self) -> Tensor:
        """Host memory that gets the last run's guesses; good until the run after the next."""
        return self._host[self._turn]

    def read(self, told: Tensor, guesses: Sequence[int]) -> list[int]:
        """Token ids of guesses, when the step that verified them has landed."""
        told_N = told.flatten()
        return [int(told_N[-1 - guess - self.first_row]) for guess in guesses]

    @torch.inference_mode()
    def begin(self, inputs: StepInputs) -> None:
        """Count what stood of a step, run the layer over it, draw every request's first guess."""
        layout = inputs.layout
        tokens, sequences, width = layout.tokens, layout.sequences, layout.max_query_len
        drawn_T = self._drawn_T[:tokens]
        start_S = inputs.starts[:-1].long()
        num_S = inputs.starts[1:].long() - start_S
        count_S = torch.ones_like(num_S)
        if width > 1:
            step_W = torch.arange(width, device=start_S.device)
            row_SW = (start_S[:, None] + step_W).clamp(max=tokens - 1)
            same_SK = drawn_T[row_SW[:, :-1]] == self.runner.ids(inputs)[row_SW[:, 1:]]
            same_SK &= step_W[1:] < num_S[:, None]
            count_S += same_SK.long().cumprod(1).sum(1)
        state = StepState(
            inputs.slots_T, inputs.tables_SB, inputs.starts, inputs.lengths_S, width, [self.cache]
        )
        out_TD = self._layer(state, self._hidden_TD[:tokens], drawn_T, inputs.positions_T)
        self._state_SD[:sequences] = out_TD[(start_S + count_S - 1).clamp(0, tokens - 1)]
        self._at_S[:sequences] = inputs.lengths_S - num_S + count_S
        self._number.zero_()
        self._guess(sequences)

    @torch.inference_mode()
    def go_on(self, inputs: StepInputs) -> None:
        """Run the layer over its own output and draw every request's next guess."""
        tables_SB = inputs.tables_SB
        sequences, size = len(tables_SB), self.runner.page_size
        at_S = self._at_S[:sequences]
        column_S = (at_S // size).clamp(max=tables_SB.shape[1] - 1)
        page_S = tables_SB.gather(1, column_S[:, None])[:, 0].long()
        # Pages that the step itself did not need may not be there: a table is 0 behind its end.
        has_page_S = ((page_S > 0) | (at_S < inputs.lengths_S)) & (at_S < tables_SB.shape[1] * size)
        slot_S = torch.where(has_page_S, page_S * size + at_S % size, -1)
        state = StepState(
            slot_S,
            tables_SB,
            self._starts[: sequences + 1],
            torch.where(has_page_S, at_S + 1, inputs.lengths_S.clamp(min=1)).int(),
            1,
            [self.cache],
        )
        out_SD = self._layer(state, self._state_SD[:sequences], self._last_S[:sequences], at_S)
        self._state_SD[:sequences] = out_SD
        self._at_S[:sequences] += 1
        self._guess(sequences)

    def _layer(self, state: StepState, hidden_TD: Tensor, ids_T: Tensor, at_T: Tensor) -> Tensor:
        with running(state):
            out = self._model.mtp_hidden(hidden_TD[None], ids_T[None], position_ids=at_T[None])
        return out[0]

    def _guess(self, sequences: int) -> None:
        ids_S = self._model.lm_head(self._state_SD[:sequences]).argmax(-1)
        self._last_S[:sequences] = ids_S
        self.guess_KS[:, :sequences].index_copy_(0, self._number, ids_S[None])
        self._number += 1
