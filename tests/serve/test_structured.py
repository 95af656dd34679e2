"""Structured answers: whatever is drawn among the allowed tokens has the structure."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mogul.core.errors import BackendError, ConfigError
from mogul.serve.params import Structure
from mogul.serve.structured import Matchers

VOCAB = 300
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def matchers(tokenizer: PreTrainedTokenizerFast) -> Matchers:
    pytest.importorskip("llguidance")
    return Matchers(tokenizer, VOCAB, [tokenizer.eos_token_id])


def speak(matchers: Matchers, tokenizer: PreTrainedTokenizerFast, structure: Structure) -> str:
    """Draw allowed tokens at random until the end."""
    dice, matcher, ids = random.Random(structure.kind), matchers.matcher(structure), []
    while len(ids) < 2000 and not matcher.is_done:
        allowed = matcher.allowed().nonzero().flatten().tolist()
        token = dice.choice(allowed)
        assert matcher.count_allowed([token]) == 1
        if token == tokenizer.eos_token_id:
            break
        matcher.advance(token)
        ids.append(token)
    return tokenizer.decode(ids)


def test_a_schema_holds(matchers: Matchers, tokenizer: PreTrainedTokenizerFast) -> None:
    found = json.loads(speak(matchers, tokenizer, Structure("json_schema", json.dumps(SCHEMA))))
    assert found["name"] in ("Ann", "Bo")
    assert found["age"] <= 99


def test_any_object_is_json(matchers: Matchers, tokenizer: PreTrainedTokenizerFast) -> None:
    assert isinstance(json.loads(speak(matchers, tokenizer, Structure("json"))), dict)


def test_regex_choice_and_grammar(matchers: Matchers, tokenizer: PreTrainedTokenizerFast) -> None:
    text = speak(matchers, tokenizer, Structure("regex", r"[a-c]{3}-\d\d"))
    assert re.fullmatch(r"[a-c]{3}-\d\d", text)
    answers = ('say "yes"', "no\n")
    assert speak(matchers, tokenizer, Structure("choice", choices=answers)) in answers
    lark = 'start: "<" word ">"\nword: /[xy]+/ | "z"'
    assert re.fullmatch(r"<([xy]+|z)>", speak(matchers, tokenizer, Structure("lark", lark)))


def test_the_mask_covers_the_columns_of_the_logits(matchers: Matchers) -> None:
    allowed = matchers.matcher(Structure("regex", "a+")).allowed()
    assert allowed.shape == (VOCAB,)
    assert allowed.sum() == 1


def test_going_back_forgets(matchers: Matchers, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = matchers.matcher(Structure("regex", "abc"))
    a, b = tokenizer("ab")["input_ids"]
    matcher.advance(a)
    matcher.advance(b)
    matcher.back(1)
    assert matcher.count_allowed([b]) == 1
    assert matcher.count_allowed([a]) == 0
    again = matchers.matcher(Structure("regex", "abc"))
    assert again.count_allowed([a]) == 1


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (Structure("json_schema", "{"), "json_schema cannot be read"),
        (Structure("regex", "(a"), "regex cannot be read"),
        (Structure("lark", "start: nothing"), "lark cannot be read"),
    ],
)
def test_what_is_no_structure_is_refused(
    matchers: Matchers, structure: Structure, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        matchers.matcher(structure)


def test_a_token_that_is_not_allowed_is_an_error(
    matchers: Matchers, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="cannot go on"):
        matchers.matcher(Structure("regex", "a")).advance(tokenizer("b")["input_ids"][0])


def test_the_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendError, match="need llguidance") as caught:
        Matchers(tokenizer, VOCAB, [0])
    assert caught.value.__notes__ == ["fix: pip install 'mogul[structured]'"]
