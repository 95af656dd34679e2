"""A speculator from a name, as commands take it."""

from __future__ import annotations

import torch

from mogul.core.errors import ArtifactError
from mogul.serve.speculate.length import DraftLength
from mogul.serve.speculate.ngram import NgramProposer
from mogul.serve.speculate.proposer import Proposer
from mogul.serve.speculate.speculator import Speculator

GUESSES = 4
"""Guessed tokens a request at most, where nothing else is asked."""


def make_speculator(
    name: str,
    *,
    guesses: int = GUESSES,
    fixed: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
) -> Speculator:
    """Make a speculator for one engine.

    Args:
        name: "ngram" (the request's own text), "mtp" (the model's layer), or the folder or hub id
            of a draft model.
        guesses: tokens a request at most.
        fixed: always guess that many, whether it pays or not.
        dtype: of a draft model.
        device: of a draft model.
    """
    return Speculator(_proposer(name, dtype, device), DraftLength(guesses, fixed=fixed))


def _proposer(name: str, dtype: str | torch.dtype, device: str) -> Proposer:
    if name == "ngram":
        return NgramProposer()
    if name == "mtp":
        from mogul.serve.speculate.mtp import MtpProposer

        return MtpProposer()
    from mogul.serve.loading import open_model
    from mogul.serve.speculate.draft_model import DraftModelProposer

    try:
        model = open_model(name, load="checkpoint", dtype=dtype, device=device, experts="mogul")
    except ArtifactError as error:
        error.add_note("guesses are by ngram, by mtp, or by the folder or hub id of a draft model")
        raise
    return DraftModelProposer(model)
