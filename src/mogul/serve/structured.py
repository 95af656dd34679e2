"""Structured answers: which tokens a schema, a regex, a choice or a grammar allows next.

Decides how a `Structure` becomes a grammar of llguidance, which parses. Grammars are kept,
so a schema asked for again costs a copy.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mogul.core.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mogul.serve.params import Structure

KEPT_GRAMMARS = 64


class Matcher:
    """How far one answer has come in its structure."""

    def __init__(self, parser: Any, vocab_size: int) -> None:
        self._parser = parser
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        """True for every token that may come next, bool [V]."""
        mask = np.frombuffer(self._parser.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(mask, bitorder="little", count=self._vocab_size)
        return torch.from_numpy(allowed.view(np.bool_))

    def advance(self, token: int) -> None:
        """Take a token into account.

        Raises:
            ConfigError: the token is not allowed here, or the grammar outgrew its limits.
        """
        if not self._parser.consume_token(token):
            raise ConfigError(f"the structure cannot go on: {self._parser.get_error()}")

    def count_allowed(self, tokens: Iterable[int]) -> int:
        """How many of the tokens, one after the other, would be allowed."""
        return self._parser.validate_tokens(list(tokens))

    def back(self, count: int) -> None:
        """Forget the last tokens."""
        if count and not self._parser.rollback(count):
            raise ConfigError(f"the structure cannot go back: {self._parser.get_error()}")

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._parser.is_stopped()


class Matchers:
    """Makes matchers for one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: Iterable[int]
    ) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: a fast one.
            vocab_size: columns of the logits, which may be more than the tokenizer's tokens.
            end_ids: tokens that end an answer, allowed where the structure is complete.

        Raises:
            BackendError: llguidance is not installed, or the tokenizer is not a fast one.
        """
        try:
            from llguidance import hf
        except ImportError as error:
            raise BackendError(
                "structured answers need llguidance", fix="pip install 'mogul[structured]'"
            ) from error
        self._vocab_size = vocab_size
        ends = sorted(end_ids) or None
        try:
            self._tokenizer = hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise BackendError(f"structured answers cannot use this tokenizer: {error}") from error
        self._parsers: OrderedDict[Structure, Any] = OrderedDict()

    def matcher(self, structure: Structure) -> Matcher:
        """A matcher at the beginning of an answer.

        Raises:
            ConfigError: the schema, regex or grammar is not one, with the parser's words.
        """
        parser = self._parsers.get(structure)
        if parser is None:
            parser = self._parse(structure)
            self._parsers[structure] = parser
            if len(self._parsers) > KEPT_GRAMMARS:
                self._parsers.popitem(last=False)
        self._parsers.move_to_end(structure)
        return Matcher(parser.deep_copy(), self._vocab_size)

    def _parse(self, structure: Structure) -> Any:
        from llguidance import LLMatcher

        try:
            parser = LLMatcher(self._tokenizer, _grammar(structure), log_level=0)
        except ValueError as error:
            raise ConfigError(f"the {structure.kind} cannot be read: {error}") from error
        if parser.is_error():
            raise ConfigError(f"the {structure.kind} cannot be read: {parser.get_error()}")
        return parser


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher

    if structure.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(structure.text)
    if structure.kind == "json":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if structure.kind == "regex":
        return LLMatcher.grammar_from_regex(structure.text)
    if structure.kind == "choice":
        answers = " | ".join(json.dumps(choice) for choice in structure.choices)
        return LLMatcher.grammar_from_lark(f"start: {answers}")
    return LLMatcher.grammar_from_lark(structure.text)
