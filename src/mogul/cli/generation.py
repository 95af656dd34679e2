"""What `generate` and `chat` share: load a model, settle how to sample, stream its words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mogul.core.errors import ArtifactError, BackendError, ConfigError
from mogul.core.log import say
from mogul.core.units import show_count, show_s

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from mogul.serve.engine import Engine
    from mogul.serve.params import SamplingParams

Message = dict[str, str]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Quantise = Literal[
    "no", "fp8", "fp8-all", "fp8-experts", "fp8-w8a16", "int4-32", "int4-64", "int4-128"
]
TORCH_NAMES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None means what the checkpoint's generation config says."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens} asks for nothing", fix="ask for 1 or more"
            )
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(
                f"--temperature {self.temperature} is below 0", fix="0 is greedy, 1 is as trained"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} is no share", fix="use a number in (0, 1]")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} is below 0", fix="0 keeps every token")


class Speaker:
    """A loaded model with its tokenizer and its way of sampling."""

    def __init__(self, voice: Voice, tokenizer: PreTrainedTokenizerBase, context: int | None):
        self.voice = voice
        self.tokenizer = tokenizer
        self.context = context

    def speak(self, prompt_ids: Sequence[int]) -> str:
        """Stream the continuation of a prompt to standard output; return its text.

        Ctrl-C ends the answer: what was said so far stands in the `Interrupted` raised.
        """
        self._check_length(len(prompt_ids))
        said: list[str] = []
        num_tokens = 0
        start_s = time.perf_counter()
        try:
            for text, count in self.voice.say(prompt_ids):
                said.append(text)
                num_tokens += count
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise Interrupted("".join(said)) from None
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        seconds = time.perf_counter() - start_s
        say(f"[{num_tokens} tokens in {show_s(seconds, 1)}, {num_tokens / seconds:.1f} tokens/s]")
        return "".join(said)

    def plain_inputs(self, text: str) -> list[int]:
        """Tokenise a text as it stands."""
        return list(self.tokenizer(text)["input_ids"])  # pyright: ignore[reportArgumentType]

    def template_inputs(self, messages: list[Message]) -> list[int]:
        """Tokenise a conversation up to where the answer begins."""
        from jinja2 import TemplateError

        tokenizer: Any = self.tokenizer
        try:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise ArtifactError(
                f"the chat template refuses this conversation: {error}",
                fix="leave out --system, which some templates do not know",
            ) from error
        return list(inputs["input_ids"])

    def _check_length(self, prompt_tokens: int) -> None:
        new = self.voice.params.max_tokens
        if prompt_tokens == 0:
            raise ConfigError("the prompt is empty", fix="give some text to continue")
        if self.context and prompt_tokens + new > self.context:
            raise ConfigError(
                f"{prompt_tokens} prompt tokens and {new} new ones exceed "
                f"the model's context of {self.context}",
                fix="shorten the prompt or lower --max-new-tokens (in a chat: /reset)",
            )


class Voice(Protocol):
    """What turns a prompt into pieces of text."""

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen."""
        ...

    def say(self, prompt_ids: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield text with the number of tokens it took."""
        ...


class EngineVoice:
    """Speaks through the engine, which remembers the conversation so far."""

    def __init__(self, engine: Engine, params: SamplingParams) -> None:
        self.engine = engine
        self.params = params

    def say(self, prompt_ids: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield text as it becomes certain."""
        for chunk in self.engine.stream(prompt_ids, self.params):
            yield chunk.text, len(chunk.token_ids)
            if chunk.answer is not None and chunk.answer.finish == "error":
                raise BackendError(
                    f"the answer failed: {chunk.answer.error}",
                    fix="ask again; shorten the prompt or lower --max-new-tokens if memory ran out",
                )


class PlainVoice:
    """Speaks through Transformers' own loop, for families whose attention knows no pages."""

    def __init__(self, model: Any, tokenizer: Any, params: SamplingParams) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.params = params

    def say(self, prompt_ids: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield the text of one token after the other, each from a forward over a cache."""
        import torch

        from mogul.serve.admit import end_ids
        from mogul.serve.params import SamplingRow
        from mogul.serve.sampling import Sampler, SamplingBatch
        from mogul.serve.stops import TextStream

        stream = TextStream(self.tokenizer, self.params)
        ends, cache, said = end_ids(self.model, self.tokenizer), None, []
        row = SamplingRow(self.params, self.params.seed or 0, tuple(prompt_ids), said)
        ids = torch.tensor([list(prompt_ids)], device=self.model.device)
        with torch.inference_mode():
            while len(said) < self.params.max_tokens:
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                if (cache := getattr(out, "past_key_values", None)) is None:
                    raise BackendError(
                        f"{type(self.model).__name__} keeps no cache to go on with",
                        fix="use a model that keeps keys and values",
                    )
                ids = Sampler().sample(out.logits[:, -1], SamplingBatch.build([row])).ids[None]
                if (token := int(ids)) in ends:
                    break
                said.append(token)
                yield stream.push(token), 1
        yield stream.close(), 0


class Interrupted(Exception):
    """Ctrl-C during an answer; `text` is what was said."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def open_speaker(
    model: str,
    sampling: Sampling,
    *,
    dtype: Dtype,
    device: str,
    experts: str,
    needs_template: bool,
    quantise: Quantise = "no",
    statistics: str | None = None,
) -> Speaker:
    """Load a checkpoint for speaking, telling on standard error what was loaded.

    Raises:
        ArtifactError: the checkpoint is damaged, or has no chat template where one is needed.
    """
    start_s = time.perf_counter()
    say(f"loading {model}")
    from mogul.models import load_tokenizer
    from mogul.models.load import named_device
    from mogul.models.quantise_load import packed_format
    from mogul.serve.loading import open_model

    where = named_device(device)
    tokenizer = load_tokenizer(model)
    if needs_template and not tokenizer.chat_template:
        raise ArtifactError(
            f"the tokenizer of {model} has no chat template: this is a base model",
            fix=f"use `mogul generate {model} --prompt TEXT`, or a chat model",
        )
    loaded = open_model(
        model,
        load="checkpoint",
        dtype=TORCH_NAMES[dtype],
        device=where,
        experts=experts,
        quantise=None if quantise == "no" else quantise,
        statistics=statistics,
    )
    params = sampling_params(loaded.generation_config, sampling)
    count = show_count(loaded.num_parameters())
    kind = str(loaded.dtype).removeprefix("torch.")
    packed = packed_format(loaded) if quantise == "no" else quantise
    kind += f", the others in {packed}," if packed else ""
    say(
        f"{count} parameters in {kind} on {loaded.device}, "
        f"{show_s(time.perf_counter() - start_s, 1)}; {_sampling_words(params)}"
    )
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    return Speaker(_voice(loaded, tokenizer, params), tokenizer, context)


def _voice(model: PreTrainedModel, tokenizer: Any, params: SamplingParams) -> Voice:
    """The engine, or where it refuses a family, Transformers' loop with a line that says so."""
    from mogul.serve.engine import Engine
    from mogul.serve.options import EngineOptions

    attention = model.config._attn_implementation or "sdpa"
    try:
        # capturing prompts takes longer than the few that are asked here gain
        options = EngineOptions(max_sequences=1, compile=False, prompt_sizes=())
        return EngineVoice(Engine(model, tokenizer, options), params)
    except BackendError as error:
        say(f"{error}; token by token through Transformers instead")
        model.set_attn_implementation(attention)
        return PlainVoice(model, tokenizer, params)


def sampling_params(config: GenerationConfig | None, sampling: Sampling) -> SamplingParams:
    """Lay the options over the checkpoint's own generation config; what neither says is off."""
    from mogul.serve.params import SamplingParams

    known: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    own = {name: getattr(config, name, None) for name in known}
    for name, value in own.items():
        if not isinstance(value, int | float | None):
            raise ArtifactError(
                f"{name} of the checkpoint's generation config is {value!r}", fix="write a number"
            )
    given = {name: getattr(sampling, name, None) for name in known}
    chosen = {
        name: next(value for value in (given[name], own[name], default) if value is not None)
        for name, default in known.items()
    }
    asked = any(value is not None for value in given.values())
    if not asked and not getattr(config, "do_sample", None):
        chosen["temperature"] = 0.0
    penalty = getattr(config, "repetition_penalty", None) or 1.0
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        repetition_penalty=float(penalty),
        **chosen,
    )


def _sampling_words(params: SamplingParams) -> str:
    if params.is_greedy:
        return "greedy"
    shown = {"temperature": params.temperature, "top-p": params.top_p, "top-k": params.top_k}
    return ", ".join(f"{name} {value:g}" for name, value in shown.items())
