"""What a request may ask of the next token, and what sampling needs to know of it at one step.

Decides which values are legal; how they act is in `sampling.py`. A request is checked here once, so
nothing further in trusts or checks a number again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from mogul.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 100
LARGEST_BIAS = 1e12
"""Beyond it the scores of fp32, penalised and divided by a temperature, may overflow."""

StructureKind = Literal["json_schema", "json", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Structure:
    """The shape an answer must have: a JSON schema, any JSON object, a regex, choice, grammar."""

    kind: StructureKind
    text: str = ""
    """The schema (JSON), the regular expression, or the Lark grammar."""

    choices: tuple[str, ...] = ()
    """The answers allowed, for `choice`."""

    def __post_init__(self) -> None:
        """Refuse an unknown, empty or unreadable structure."""
        if self.kind not in get_args(StructureKind):
            raise ConfigError(
                f"kind {self.kind!r} is unknown", fix=f"use one of {get_args(StructureKind)}"
            )
        if not isinstance(self.text, str):
            raise ConfigError(
                f"the {self.kind} of a structured answer is a {type(self.text).__name__}, not a "
                "text",
                fix="json.dumps makes text of a schema",
            )
        object.__setattr__(self, "choices", _checked_list("choices", "are", self.choices))
        for choice in self.choices:
            if not isinstance(choice, str):
                raise ConfigError(f"answer {choice!r} is no text", fix="give texts to choose from")
        if self.kind == "choice":
            if not self.choices or not all(self.choices):
                raise ConfigError("a choice needs at least one answer, none of them empty")
        elif self.kind != "json" and not self.text.strip():
            raise ConfigError(f"the {self.kind} of a structured answer is empty")


def _checked_list(name: str, verb: str, values: Any) -> tuple[Any, ...]:
    """A list, a tuple or an array as a tuple."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise ConfigError(f"{name} {values!r} {verb} no list", fix=f"{name}=({values!r},)")
    return tuple(values)


_WHOLE = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends."""

    max_tokens: int = 128
    """New tokens at most."""

    min_tokens: int = 0
    """New tokens before any stop token, stop string or end of text counts."""

    temperature: float = 1.0
    """0 is greedy, 1 is as trained; what is colder than 1e-6 counts as 1e-6."""

    top_k: int = 0
    """Sample from this many likeliest tokens, and those tied with the last; 0 is all."""

    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities sum to this."""

    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the likeliest."""

    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or answer."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer."""

    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer, once for each time."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""

    seed: int | None = None
    """Same seed, same prompt: same tokens, whoever else is in the batch. None: drawn."""

    stop: tuple[str, ...] = ()
    """Texts that end the answer and are cut off it."""

    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own end of text."""

    ignore_eos: bool = False
    """Go on after the model's end of text."""

    include_stop: bool = False
    """Keep the stop string at the end of the text."""

    logprobs: int | None = None
    """Give the log-probability of each chosen token and of this many likeliest (0: its own only).

    They are the model's own: before temperature, penalties, bias and filters."""

    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt. The prompt is then computed whole, prefix or not."""

    structure: Structure | None = None
    """Shape the text must have."""

    routed_experts: bool = False
    """Give the experts picked for every token of prompt and answer."""

    def __post_init__(self) -> None:
        """Refuse what means nothing, naming the value and what would."""
        self._check_kinds()
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens {self.max_tokens} asks for nothing", fix="ask for 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens {self.min_tokens} is not in 0..{self.max_tokens}")
        self._check_numbers()
        self._check_bias()
        self._check_stops()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise ConfigError(f"{name} {value} is not in 0..{MAX_LOGPROBS}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} is not in 0..2^63 - 1")

    def _check_kinds(self) -> None:
        """Refuse values of another kind: half a token would only fail in the middle of a step."""
        for name in _WHOLE:
            value = getattr(self, name)
            may_lack = value is None and name in _OPTIONAL
            if not may_lack and not isinstance(value, Integral):
                raise ConfigError(f"{name} {value!r} is no whole number", fix="give a whole number")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise ConfigError(f"{name} {value!r} is no number", fix="give a number")
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise ConfigError(
                f"structure {self.structure!r} is no Structure",
                fix='structure=Structure("json"), or one with a schema, regex, choice or grammar',
            )

    def _check_numbers(self) -> None:
        checks: tuple[tuple[str, bool, str], ...] = (
            ("temperature", self.temperature >= 0, "0 is greedy, 1 is as trained"),
            ("top_k", self.top_k >= 0, "0 keeps every token"),
            ("top_p", 0 < self.top_p <= 1, "use a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "use a number in [0, 1]"),
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "1 changes nothing"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "use a number in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "use a number in [-2, 2]"),
        )
        for name, is_legal, fix in checks:
            value = getattr(self, name)
            if not is_legal or not isfinite(value):
                raise ConfigError(f"{name} {value} is out of range", fix=fix)

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(
                f"logit_bias {self.logit_bias!r} is no mapping", fix="give {token id: bias}"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ConfigError(f"logit_bias names {len(self.logit_bias)} tokens: {MAX_LOGIT_BIAS}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral):
                raise ConfigError(f"logit_bias names token {token!r}", fix="name tokens by id")
            if token < 0 or not isinstance(bias, Real) or not abs(bias) <= LARGEST_BIAS:
                raise ConfigError(f"logit_bias {bias!r} of token {token} cannot be added")

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):
            raise ConfigError("stop is a text, not a list of texts", fix=f"stop=({self.stop!r},)")
        if len(_checked_list("stop", "is", self.stop)) > MAX_STOP_STRINGS:
            raise ConfigError(f"{len(self.stop)} stop strings, at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not isinstance(text, str):
                raise ConfigError(f"stop string {text!r} is no text", fix="or use stop_token_ids")
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise ConfigError(
                    f"a stop string of {len(text)} characters, not 1 to {MAX_STOP_CHARACTERS}"
                )
        for token in _checked_list("stop_token_ids", "is", self.stop_token_ids):
            if not isinstance(token, Integral):
                raise ConfigError(f"stop_token_ids names token {token!r}", fix="name tokens by id")
        if any(token < 0 for token in self.stop_token_ids):
            raise ConfigError(f"stop_token_ids {self.stop_token_ids} hold a negative id")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def has_filters(self) -> bool:
        """Whether part of the vocabulary is cut off before the draw."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits: whose it is and how far that request is."""

    params: SamplingParams
    seed: int
    """The request's seed, drawn at its admission where the request names none."""

    prompt_ids: Sequence[int] = ()
    """Read only where penalties ask for it."""

    output_ids: Sequence[int] = ()
    """Tokens of the answer so far; their number is the position in the random stream."""

    end_ids: tuple[int, ...] = ()
    """Tokens that would end the answer: not sampled before `min_tokens`."""

    allowed_V: Tensor | None = None
    """True where the structure allows a token (bool, on any device); None allows all."""
