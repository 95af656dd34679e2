"""Steps as captured graphs, over ladders of batch sizes and of tokens; one compiled decoder layer.

A step is hundreds of short launches; captured once, the device runs them without the host. Decodes
are captured by batch size; steps with prompts, up to where the device is slower than the host, by
tokens, which lie among the sequences as they come. Layers of one kind share their compiled code:
the first one compiles it, the others find it, and the next start finds it on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from mogul.core.log import log, say
from mogul.kernels.turn import CHUNKS, FEW, FRESH
from mogul.serve.inputs import Entry, Layout

if TYPE_CHECKING:
    from mogul.serve.runner import Runner

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)

MOST_GUESSING = 64
"""Sequences up to which steps with guesses are captured, by powers of two."""

MOST_MIXED = 64
"""Sequences, and rows of logits, of a captured step with prompts."""

_RECORDED = "_output_capturing_hooks_installed"
"""Transformers' mark of a model that has its recorders of outputs."""

Rung = tuple[int, int]
"""Sequences, and tokens of each; or tokens, and `MIXED`."""

MIXED = -1
"""Stands where sequences do not have a number of tokens in common."""


def rungs_up_to(most: int) -> list[int]:
    """Batch sizes that are captured for at most `most` sequences."""
    rungs = [rung for rung in LADDER if rung < most]
    last = LADDER[-1]
    rungs += range(last + 64, most, 64)
    return [*rungs, most]


def guessing_rungs(rungs: Sequence[int]) -> list[int]:
    """The sizes at which steps with guesses are captured: the largest up to each power of two."""
    few = {(rung - 1).bit_length(): rung for rung in sorted(rungs)}
    return [rung for rung in few.values() if rung <= MOST_GUESSING]


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of a model, by the class names it declares."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def take_recorders_off(model: nn.Module) -> None:
    """Take off the hooks by which Transformers records outputs; asked for some, it puts them back.

    A model that was once asked for hidden states or router logits has them on every layer, and
    compiled code would break at each.
    """
    for module in model.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if _is_recorder(hook)]:
            del hooks[key]
        if getattr(module, _RECORDED, False):
            setattr(module, _RECORDED, False)


def _is_recorder(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def compile_layers(model: Any) -> int:
    """Compile every decoder layer, lazily and for any number of tokens; returns how many."""
    from mogul.serve.passes import FewRows

    take_recorders_off(model)
    layers = decoder_layers(model)
    options: dict[str, Any] = {"post_grad_custom_pre_pass": FewRows()}
    for layer in layers:
        try:
            layer.compile(dynamic=True, options=options)
        except RuntimeError as error:  # a version of torch that takes no pass as an option
            log.warning(f"layers are compiled without fast picks: {error}")
            options = {}
            layer.compile(dynamic=True)
    return len(layers)


class Ladder:
    """Captured decode steps by batch size, and by tokens a request where guesses are verified.

    And steps with prompts, by tokens; those of more are run by the host.
    """

    def __init__(
        self,
        runner: Runner,
        rungs: Sequence[int],
        limits: Layout,
        guesses: int = 0,
        prompts: Sequence[int] = (),
    ) -> None:
        self.runner = runner
        few = guessing_rungs(rungs)
        self.rungs: list[Rung] = [(rung, 1) for rung in sorted(rungs)]
        self.rungs += [
            (rung, width)
            for width in range(2, guesses + 2)
            for rung in few
            if rung * width <= limits.tokens
        ]
        self.mixed: list[Rung] = [(t, MIXED) for t in sorted(prompts) if t <= limits.tokens]
        self.most_mixed = min(MOST_MIXED, limits.sequences)
        self.pages = limits.pages
        self._graphs: dict[Rung, tuple[Any, Tensor]] = {}

    def layout(self, rung: Rung) -> Layout:
        """So many sequences, with so many tokens and rows each; or so many tokens in all."""
        sequences, width = rung
        if width == MIXED:
            tokens, most = sequences, self.most_mixed
            # sequences of a few tokens are attended to as prompts: decodes then have small tiles
            return Layout(tokens, most, most, self.pages, tokens, FEW | FRESH | CHUNKS)
        return Layout(sequences * width, sequences, sequences * width, self.pages, width)

    def capture(self, *, tune: bool) -> None:
        """Capture every rung; steps with prompts may fail, decodes may not.

        A single token is compiled apart. With `tune` its products become plain reductions whose
        tiles are searched: matrix products of one row read their weights too slowly.
        """
        start_s = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        try:  # the largest first: the others reuse its memory
            self._capture(self.mixed, pool, tune=False)
        except Exception as error:  # no memory, above all
            log.warning(f"steps with prompts are not captured: {type(error).__name__}: {error}")
            torch.cuda.synchronize(self.runner.device)
            self.mixed, self._graphs, pool = [], {}, torch.cuda.graph_pool_handle()
        self._capture(self.rungs, pool, tune=tune)
        torch.cuda.synchronize(self.runner.device)
        sizes = ", ".join(str(sequences) for sequences, width in self.rungs if width == 1)
        width = max(width for _, width in self.rungs)
        prompts = f", with prompts up to {self.mixed[-1][0]}" if self.mixed else ""
        spent_s = time.perf_counter() - start_s
        say(
            f"captured decode steps of {sizes} sequences, up to {width} tokens{prompts}, "
            f"in {spent_s:.1f} s"
        )

    def _capture(self, rungs: Sequence[Rung], pool: Any, *, tune: bool) -> None:
        for rung in sorted(rungs, key=lambda rung: -self.layout(rung).tokens):
            inputs = self.runner.send((), self.layout(rung), {}, is_captured=True)
            stream = torch.cuda.Stream(self.runner.device)
            stream.wait_stream(torch.cuda.current_stream(self.runner.device))
            with torch.cuda.stream(stream):
                search = tune and rung == (1, 1)
                with torch._inductor.config.patch(coordinate_descent_tuning=search):
                    self.runner.forward(inputs)
                self.runner.forward(inputs)
            torch.cuda.current_stream(self.runner.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self.runner.forward(inputs)
            self._graphs[rung] = (graph, logits)

    def rung_of(self, entries: Sequence[Entry]) -> Rung | None:
        """The smallest rung that holds a step; None where there is none."""
        if not self._graphs:
            return None
        count = len(entries)
        if all(e.count == e.rows == e.draws for e in entries):  # decodes, guesses included
            width = max(e.count for e in entries)
            fits = (rung for rung in self.rungs if rung[1] == width and rung[0] >= count)
            if (found := next(fits, None)) is not None:
                return found
        if max(count, sum(e.rows for e in entries)) > self.most_mixed:
            return None
        tokens = sum(e.count for e in entries)
        return next((rung for rung in self.mixed if rung[0] >= tokens), None)

    def replay(self, rung: Rung, count: int) -> Tensor:
        """Run a captured step whose numbers lie in the arena: logits of its first rows."""
        graph, logits = self._graphs[rung]
        graph.replay()
        return logits[:count]


def try_ladder(
    runner: Runner,
    rungs: Sequence[int],
    limits: Layout,
    guesses: int = 0,
    prompts: Sequence[int] = (),
    *,
    tune: bool,
) -> Ladder | None:
    """Capture steps up to `limits` where it can be done; where not, say why and run uncaptured."""
    if runner.device.type != "cuda":
        return None
    ladder = Ladder(runner, rungs, limits, guesses, prompts)
    try:
        with torch.inference_mode():
            ladder.capture(tune=tune)
    except Exception as error:  # a kernel that synchronises, a family that branches on data
        log.warning(f"steps are not captured: {type(error).__name__}: {error}")
        torch.cuda.synchronize(runner.device)
        return None
    return ladder


def capture_calls(
    calls: Iterable[tuple[Rung, Callable[[], None]]], device: torch.device
) -> dict[Rung, Callable[[], None]]:
    """Capture calls that read and write fixed memory, one graph each; none where one cannot be."""
    found: dict[Rung, Callable[[], None]] = {}
    try:
        pool = torch.cuda.graph_pool_handle()
        for name, call in calls:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                call()
                call()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
            found[name] = graph.replay
    except Exception as error:  # a kernel that synchronises
        log.warning(f"guessing is not captured: {type(error).__name__}: {error}")
        torch.cuda.synchronize(device)
        return {}
    return found
