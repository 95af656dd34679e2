"""Guesses of the model's own multi-token-prediction layer.

The layer joins the model's last hidden state at a position with the token after it and says the
token after that. Its keys and values lie in one more set of pages under the engine's page numbers,
in the model's own dtype: one layer is little, and so it needs no scales where the engine's are fp8.
Hidden states come from the engine's own steps, through a hook on the final norm that copies them
into a fixed buffer, so that captured steps leave them there too. Further guesses feed the layer its
own output; positions it filled with guesses are filled again once their tokens are known.

Greedy requests of a decode step are guessed for on an accelerator without the host (`chain.py`);
everything else, prompts above all, waits here as hidden states until `propose` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.serve.sampling import Sampler, SamplingBatch
from mogul.serve.speculate.chain import Chain
from mogul.serve.speculate.proposer import Drafting, Proposer, Trails, guess_row

if TYPE_CHECKING:
    from mogul.serve.engine import Engine
    from mogul.serve.inputs import Entry, Layout
    from mogul.serve.requests import Live
    from mogul.serve.runner import Runner

MOST_PENDING = 65_536
"""Hidden states kept for requests that nobody guesses for; older ones go, which costs guesses."""


class MtpProposer(Proposer):
    """Lets the model's MTP layer say the tokens after the next."""

    def __init__(self, *, follow: bool | None = None) -> None:
        """Start unattached.

        Args:
            follow: guess on the device behind a step; None is on accelerators.
        """
        self._follow = follow
        self._chain: Chain | None = None
        self._following: tuple[Sequence[Entry], Layout, int] | None = None
        """The step just observed, if the chain shall follow it, and with how many guesses."""

        self._ahead: list[tuple[Live, int, list[int]]] = []
        """Requests the chain has guessed for, how often each had given way, and the guesses."""

        self._told: Tensor | None = None
        """Where the host will find the ids of these guesses."""

        self._verified: Tensor | None = None
        """The same, of the guesses that were handed out last."""

        self._sampler = Sampler()
        self._trails = Trails()
        self._pending: dict[int, list[tuple[int, Tensor]]] = {}
        """Request -> (first position, hidden states [n, D]) not yet passed through the layer."""

        self._handle: Any = None

    def token_bytes(self, runner: Runner) -> int:
        """One more layer like the last, in the model's dtype."""
        shape = runner.shapes[-1]
        return shape.elements * shape.dtype.itemsize

    def work_bytes(self, runner: Runner, step_tokens: int, captured_tokens: int) -> int:
        """The hidden states of a step; captured calls hold a few hundred tokens of one layer."""
        del captured_tokens
        return step_tokens * runner.model.config.hidden_size * runner.model.dtype.itemsize

    def attach(self, engine: Engine) -> None:
        """Find the layer, allocate its pages, hook the final norm.

        Raises:
            ConfigError: the model has no such layer.
        """
        from mogul.serve.attention import LayerCache
        from mogul.serve.inputs import Arena

        runner, sizes = engine.runner, engine.sizes
        model: Any = runner.model
        if not getattr(model, "has_mtp", False):
            raise ConfigError(
                f"{type(model).__name__} has no multi-token-prediction layer",
                fix="guess by n-gram or a draft model, or use a checkpoint with "
                "num_nextn_predict_layers = 1",
            )
        self._model, self._page_size = model, sizes.page_size
        shape, limits = runner.shapes[-1], sizes.largest_step
        size = (sizes.num_pages, sizes.page_size, shape.num_kv_heads, shape.width)
        kind = {"dtype": shape.dtype, "device": runner.device}
        self._cache = LayerCache(torch.zeros(size, **kind), torch.zeros(size, **kind))
        self._arena = Arena(limits, runner.device)
        self._limit = limits.tokens
        hidden = (limits.tokens, model.config.hidden_size)
        self._hidden_TD = torch.zeros(hidden, dtype=model.dtype, device=runner.device)
        layer = model.model.layers[model.config.num_hidden_layers]
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module._mogul_paged_layer = torch.tensor(0)
        self._handle = model.model.norm.register_forward_hook(self._keep)
        self._room, self._runner = engine.room, runner
        is_cpu = runner.device.type == "cpu"
        if self._follow or (self._follow is None and not is_cpu):
            assert engine.speculator is not None
            most = engine.speculator.length.most
            self._chain = Chain(runner, self._cache, self._hidden_TD, most)

    def warm_up(self) -> None:
        """Capture the chain."""
        if self._chain is not None:
            self._chain.capture()

    def _keep(self, _module: Any, _args: Any, output: Tensor) -> None:
        if output.shape[1] <= self._limit:
            self._hidden_TD[: output.shape[1]].copy_(output[0])

    def observe(self, entries: Sequence[Entry], next_count: int) -> None:
        """Take the hidden states of a step before the next one overwrites them."""
        self._following = None
        if next_count and self._chain is not None:
            layout = self._chain.layout(entries)
            if layout is not None and not any(e.request.id in self._pending for e in entries):
                self._following = (entries, layout, next_count)
                return
        copy_TD = self._hidden_TD[: sum(entry.count for entry in entries)].clone()
        at = 0
        for entry in entries:
            held = self._pending.setdefault(entry.request.id, [])
            while held and held[-1][0] >= entry.first:  # computed anew, after a guess that fell
                held.pop()
            if held and held[-1][0] + len(held[-1][1]) > entry.first:
                start, rows_TD = held[-1]
                held[-1] = (start, rows_TD[: entry.first - start])
            held.append((entry.first, copy_TD[at : at + entry.count]))
            at += entry.count
            while sum(len(rows_TD) for _, rows_TD in held) > MOST_PENDING:
                held.pop(0)

    def follow(self, ids_R: Tensor) -> None:
        """Let the chain guess on from the drawn tokens."""
        if self._following is None or self._chain is None:
            return
        (entries, layout, count), self._following = self._following, None
        self._chain.run(layout, ids_R, count)
        self._told = self._chain.told
        self._ahead = [
            (entry.request, entry.request.num_preempted, self._chain.guesses(i, count))
            for i, entry in enumerate(entries)
        ]

    def skip(self) -> None:
        """Note what the chain has computed; its guesses are not wanted."""
        self._take_ahead()

    def _take_ahead(self) -> dict[int, list[int]]:
        """The chain's guesses by request; the tokens it followed are known by now."""
        ahead, self._ahead, self._following = self._ahead, [], None
        found = {}
        for request, num_preempted, guesses in ahead:
            if request.finish is None and request.num_preempted == num_preempted:
                self._trails.leave(request, len(request.tokens) - 1, [])
                found[request.id] = guesses
        return found

    def settle(self, guesses: Sequence[int]) -> list[int]:
        """Token ids of the chain's guesses."""
        assert self._chain is not None
        assert self._verified is not None
        return self._chain.read(self._verified, guesses)

    def propose(self, requests: Sequence[Drafting], counts: Sequence[int]) -> list[list[int]]:
        """See `Proposer`."""
        live = cast("Sequence[Live]", requests)
        ahead, self._verified = self._take_ahead(), self._told
        guesses = [ahead.get(one.id, [])[:count] for one, count in zip(live, counts, strict=True)]
        if self._runner.device.type == "cpu":
            guesses = [self.settle(guessed) if guessed else [] for guessed in guesses]
        rest = [i for i, guessed in enumerate(guesses) if not guessed]
        if rest:
            wanted = [1 if self._will_follow(live[i]) else counts[i] for i in rest]
            eager = self._propose([live[i] for i in rest], wanted)
            for i, guessed in zip(rest, eager, strict=True):
                guesses[i] = guessed
        if self._chain is not None:  # pages for the guesses that the chain will make next
            for one, count in zip(live, counts, strict=True):
                whole = one.prompt_tokens + one.output_tokens - one.computed
                self._room.fit(one, min(1 + 2 * count, whole))
        return guesses

    def _will_follow(self, request: Live) -> bool:
        """Whether the chain makes all guesses of a request but its first."""
        return self._chain is not None and request.params.is_greedy and not request.needs_results

    def _propose(self, live: Sequence[Live], counts: Sequence[int]) -> list[list[int]]:
        """Catch up with the requests and guess step by step, the host in between."""
        from mogul.serve.inputs import Entry

        guesses: list[list[int]] = [[] for _ in live]
        with torch.inference_mode():
            hidden_SD = self._catch_up(live)
            asked = [i for i, hidden_D in enumerate(hidden_SD) if hidden_D is not None]
            rows_SD = [cast("Tensor", hidden_SD[i]) for i in asked]
            while asked:
                self._draw(torch.stack(rows_SD), live, guesses, asked)
                kept = [j for j, i in enumerate(asked) if len(guesses[i]) < counts[i]]
                asked = [asked[j] for j in kept]
                if not asked:
                    break
                entries = [
                    Entry(live[i], len(live[i].tokens) + len(guesses[i]) - 2, 1, 1, 1)
                    for i in asked
                ]
                hidden_TD = torch.stack([rows_SD[j] for j in kept])
                rows_SD = list(self._run(entries, hidden_TD, [guesses[i][-1] for i in asked]))
        for one, guessed in zip(live, guesses, strict=True):
            # What was filled with guesses was fed the layer's own states: it is done again.
            if guessed:
                self._trails.leave(one, len(one.tokens) - 1, [])
        return guesses

    def _draw(
        self, hidden_SD: Tensor, live: Sequence[Live], guesses: list[list[int]], asked: list[int]
    ) -> None:
        logits_SV = self._model.lm_head(hidden_SD)
        rows = [guess_row(live[i], guesses[i]) for i in asked]
        drawn = self._sampler.sample(logits_SV, SamplingBatch.build(rows)).ids.tolist()
        for i, token in zip(asked, drawn, strict=True):
            guesses[i].append(token)

    def _catch_up(self, requests: Sequence[Live]) -> list[Tensor | None]:
        """Pass all waiting hidden states through the layer: its output at each request's end.

        None where the engine computed nothing of a request since its pages changed.
        """
        from mogul.serve.inputs import Entry

        last: list[Tensor | None] = [None] * len(requests)
        entries: list[Entry] = []
        parts: list[Tensor] = []
        nexts: list[int] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            first, rows_TD = self._waiting(request)
            while rows_TD is not None and len(rows_TD):
                room = self._limit - len(nexts)
                take, rows_TD = rows_TD[:room], rows_TD[room:]
                entries.append(Entry(request, first, len(take), 1, 1))
                parts.append(take)
                owners.append(i)
                first += len(take)
                nexts += request.tokens[first - len(take) + 1 : first + 1]
                if len(nexts) == self._limit:
                    self._finish(entries, parts, nexts, owners, last)
                    entries, parts, nexts, owners = [], [], [], []
        if entries:
            self._finish(entries, parts, nexts, owners, last)
        return last

    def _finish(
        self,
        entries: list[Entry],
        parts: list[Tensor],
        nexts: list[int],
        owners: list[int],
        last: list[Tensor | None],
    ) -> None:
        out_TD = self._run(entries, torch.cat(parts), nexts)
        at = 0
        for owner, entry in zip(owners, entries, strict=True):
            at += entry.count
            last[owner] = out_TD[at - 1]

    def _waiting(self, request: Live) -> tuple[int, Tensor | None]:
        """First position to compute, and the hidden states from there to the last but one token."""
        held = self._pending.pop(request.id, [])
        stop = len(request.tokens) - 1
        first = self._trails.valid(request, stop)
        at, parts = stop, []
        for start, rows_TD in reversed(held):
            if start + len(rows_TD) < at or start >= at:
                continue  # behind a gap, or all of it guesses that fell
            parts.insert(0, rows_TD[max(first - start, 0) : at - start])
            at = max(start, first)
            if at == first:
                break
        return at, torch.cat(parts) if parts else None

    def _run(self, entries: list[Entry], hidden_TD: Tensor, nexts: list[int]) -> Tensor:
        """The layer over some positions of some requests: its output [T, D]."""
        from mogul.serve.attention import StepState, running
        from mogul.serve.inputs import layout_of

        layout = layout_of(entries, self._page_size)
        inputs = self._arena.send(entries, layout, self._page_size, _ANY)
        state = StepState(
            slots_T=inputs.slots_T,
            tables_SB=inputs.tables_SB,
            starts=inputs.starts,
            lengths_S=inputs.lengths_S,
            max_query_len=layout.max_query_len,
            caches=[self._cache],
        )
        next_ids = torch.tensor(nexts, dtype=torch.int64, device=hidden_TD.device)
        with running(state):
            out = self._model.mtp_hidden(
                hidden_TD[None], next_ids[None], position_ids=inputs.positions_T[None]
            )
        return out[0]

    def forget(self, request_id: int) -> None:
        """A request ended."""
        self._trails.forget(request_id)
        self._pending.pop(request_id, None)

    def close(self) -> None:
        """Leave the model as it was, and give pages, hidden states and captured calls back."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.skip()
        self._pending.clear()
        self._chain = self._told = self._verified = None
        for name in ("_cache", "_arena", "_hidden_TD"):
            vars(self).pop(name, None)


class _Zeros(dict[int, int]):
    """Rows of tokens that the layer reads elsewhere."""

    def __missing__(self, _key: int) -> int:
        return 0


_ANY = _Zeros()
