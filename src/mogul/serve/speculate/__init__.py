"""Speculation: guess some tokens cheaply, verify them in one step, keep what the model would say.

A `Proposer` guesses (earlier text, a draft model, the model's own MTP head); `verify` compares with
what the model draws; `DraftLength` decides how many guesses pay.
"""

from __future__ import annotations

from mogul.serve.speculate.length import DraftLength, SpeculationStats
from mogul.serve.speculate.make import make_speculator
from mogul.serve.speculate.ngram import NgramProposer
from mogul.serve.speculate.proposer import Drafting, Proposer
from mogul.serve.speculate.speculator import Speculator
from mogul.serve.speculate.verify import count_tokens, draft_rows

__all__ = [
    "DraftLength",
    "Drafting",
    "NgramProposer",
    "Proposer",
    "SpeculationStats",
    "Speculator",
    "count_tokens",
    "draft_rows",
    "make_speculator",
]
