"""What `generate` and `chat` share: load a model, settle how to sample, stream its words."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.log import say
from mogul.core.units import show_count, show_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
_TORCH_NAMES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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


@dataclass
class Speaker:
    """A loaded model with its tokenizer and its way of sampling."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig

    def speak(self, inputs: Mapping[str, Any]) -> str:
        """Stream the continuation of a prompt to standard output; return its text.

        Ctrl-C ends the answer: what was said so far stands in the `Interrupted` raised.
        """
        prompt = inputs["input_ids"]
        self._check_length(prompt.shape[1])
        streamer = _make_streamer(self.tokenizer)
        inputs = {
            name: inputs[name].to(self.model.device)
            for name in ("input_ids", "attention_mask")
            if name in inputs
        }
        generate: Any = self.model.generate  # a mixin's method, which pyright takes for a tensor
        start_s = time.perf_counter()
        try:
            out = generate(**inputs, generation_config=self.config, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()
            raise Interrupted(streamer.text) from None
        seconds = time.perf_counter() - start_s
        new_tokens = out.shape[1] - prompt.shape[1]
        say(f"[{new_tokens} tokens in {show_s(seconds, 1)}, {new_tokens / seconds:.1f} tokens/s]")
        return streamer.text

    def plain_inputs(self, text: str) -> Mapping[str, Any]:
        """Tokenise a text as it stands."""
        return self.tokenizer(text, return_tensors="pt")

    def template_inputs(self, messages: list[Message]) -> Mapping[str, Any]:
        """Tokenise a conversation up to where the answer begins."""
        from jinja2 import TemplateError

        tokenizer: Any = self.tokenizer
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ArtifactError(
                f"the chat template refuses this conversation: {error}",
                fix="leave out --system, which some templates do not know",
            ) from error

    def _check_length(self, prompt_tokens: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        wanted = prompt_tokens + (self.config.max_new_tokens or 0)
        if prompt_tokens == 0:
            raise ConfigError("the prompt is empty", fix="give some text to continue")
        if limit and wanted > limit:
            raise ConfigError(
                f"{prompt_tokens} prompt tokens and {self.config.max_new_tokens} new ones exceed "
                f"the model's context of {limit}",
                fix="shorten the prompt or lower --max-new-tokens (in a chat: /reset)",
            )


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
) -> Speaker:
    """Load a checkpoint for speaking, telling on standard error what was loaded.

    Raises:
        ArtifactError: the checkpoint is damaged, or has no chat template where one is needed.
    """
    start_s = time.perf_counter()
    say(f"loading {model}")
    import torch

    from mogul.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    if needs_template and not tokenizer.chat_template:
        raise ArtifactError(
            f"the tokenizer of {model} has no chat template: this is a base model",
            fix="use `mogul generate MODEL --prompt TEXT`, or a chat model",
        )
    loaded = load_model(model, dtype=_TORCH_NAMES[dtype], experts=experts, device=_device(device))
    loaded.eval()
    torch.manual_seed(sampling.seed)
    config = generation_config(loaded, tokenizer, sampling)
    count = show_count(loaded.num_parameters())
    say(
        f"{count} parameters in {str(loaded.dtype).removeprefix('torch.')} on {loaded.device}, "
        f"{show_s(time.perf_counter() - start_s, 1)}; {_sampling_words(config)}"
    )
    return Speaker(loaded, tokenizer, config)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> GenerationConfig:
    """Lay the options over the checkpoint's own generation config."""
    config = copy.deepcopy(model.generation_config)
    if config is None:
        from transformers import GenerationConfig

        config = GenerationConfig.from_model_config(model.config)
    config.max_new_tokens, config.max_length = sampling.max_new_tokens, None
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(sampling, name)) is not None:
            setattr(config, name, value)
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
    elif sampling.top_p is not None or sampling.top_k is not None:
        config.do_sample = True
    if not config.do_sample:
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = None
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return config


def _sampling_words(config: GenerationConfig) -> str:
    if not config.do_sample:
        return "greedy"
    shown = {"temperature": config.temperature, "top-p": config.top_p, "top-k": config.top_k}
    return ", ".join(f"{name} {value:g}" for name, value in shown.items() if value is not None)


def _make_streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Build a streamer that prints to standard output and remembers what it printed."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
