"""One engine over several devices: every rank runs the same engine on its share of the model.

Nothing is sent to plan a step: ranks that are told the same, in the same order, plan alike, compute
the same logits and draw the same tokens. What a rank could decide by itself (how many pages fit,
the seed of seeds) is agreed on once. A step that fails on one rank ends the engine on all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mogul.core.errors import ConfigError
from mogul.models.quantise import PackedExperts
from mogul.models.quantise_linears import PackedLinear
from mogul.parallel import lay_out
from mogul.serve.options import EngineOptions
from mogul.serve.sizes import Sizes
from mogul.spec.parallel import Parallel

if TYPE_CHECKING:
    from mogul.serve.speculate import Speculator


def check_spread(
    parallel: Parallel, speculator: Speculator | None = None, quantise: str | None = None
) -> None:
    """Refuse what can be refused before any weight is read.

    Raises:
        ConfigError: copies of the attention or stages, which would be engines of their own, no
            ranks, quantised weights, or guesses that ranks would not make alike.
    """
    if parallel.dp > 1 or parallel.pp > 1:
        raise ConfigError(
            f"an engine over dp={parallel.dp} copies or pp={parallel.pp} stages is not there",
            fix=f"cut the attention instead: tp={parallel.devices}",
        )
    if speculator is not None:
        _check_guesses(speculator)
    if quantise is not None:
        raise ConfigError(
            "quantised weights cannot be cut over devices",
            fix="leave quantise out, or open the unquantised checkpoint",
        )
    if not dist.is_initialized():
        raise ConfigError(
            f"an engine over {parallel.devices} devices needs as many processes",
            fix="start them with torchrun and call mogul.parallel.start(), or use parallel.launch",
        )


def spread(model: Any, parallel: Parallel, speculator: Speculator | None = None) -> tuple[int, int]:
    """Cut a model over the ranks of this run; each keeps its heads, experts and pages.

    Returns:
        Which share of the heads this rank has, of how many.

    Raises:
        ConfigError: as `check_spread`.
    """
    packed = any(isinstance(module, (PackedExperts, PackedLinear)) for module in model.modules())
    check_spread(parallel, speculator, "packed" if packed else None)
    heads = lay_out(model, parallel, wire="auto").groups.tp
    if speculator is not None:
        speculator.length.agree = agree_on_times(model.device)
    return heads.rank(), heads.size()


def _check_guesses(speculator: Speculator) -> None:
    """Refuse guesses that ranks would not make alike."""
    from mogul.serve.speculate.mtp import MtpProposer

    if isinstance(speculator.proposer, MtpProposer):
        raise ConfigError(
            "the multi-token-prediction layer cannot guess for a model cut over devices",
            fix="guess by n-gram or a draft model, or nothing",
        )


def agree_on_times(device: torch.device) -> Callable[[list[float]], list[float]]:
    """The slowest rank's times, for choices that all ranks must make alike."""

    def agree(seconds: list[float]) -> list[float]:
        times = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.tolist()

    return agree


def settle_options(options: EngineOptions, device: torch.device) -> EngineOptions:
    """One seed for all ranks; layers with exchanges are not compiled, nor captured with prompts."""
    seed = random.getrandbits(62) if options.seed is None else options.seed
    agreed = torch.tensor([seed], dtype=torch.int64, device=device)
    dist.broadcast(agreed, 0)
    return replace(options, seed=int(agreed), compile=False, fuse=False, prompt_sizes=())


def settle_sizes(sizes: Sizes, device: torch.device) -> Sizes:
    """As many pages as the fullest device has room for."""
    fewest = torch.tensor([sizes.num_pages], dtype=torch.int64, device=device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    pages = int(fewest)
    return replace(
        sizes, num_pages=pages, max_length=min(sizes.max_length, pages * sizes.page_size)
    )
