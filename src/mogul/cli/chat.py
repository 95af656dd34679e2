"""`mogul chat`: a conversation in the terminal, through the tokenizer's chat template."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mogul.cli.generation import (
    Dtype,
    Interrupted,
    Message,
    Quantise,
    Sampling,
    Speaker,
    open_speaker,
)
from mogul.core.errors import ConfigError, nearest
from mogul.core.log import say

COMMANDS = {
    "/reset": "forget the conversation",
    "/quit": "leave (so does Ctrl-D)",
    "/help": "show these commands",
}

EXAMPLES = """
examples:
  mogul chat ./moge
  mogul chat ./moge --system "Answer in one sentence." --temperature 0.6
  echo "What is a router?" | mogul chat ./moge

while talking:
  /reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer
"""


@dataclass(frozen=True)
class Options:
    """Talk to a model. Answers go to standard output, everything else to standard error."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Checkpoint folder or hub id; its tokenizer must have a chat template."""

    system: str | None = None
    """System prompt. Default: none, or what the template puts there itself."""

    max_new_tokens: int = 512
    """Tokens of one answer at most."""

    temperature: float | None = None
    """0 is greedy, 1 as trained. Default: the checkpoint's generation config."""

    top_p: float | None = None
    """Sample from the fewest tokens whose probabilities sum to this."""

    top_k: int | None = None
    """Sample from this many likeliest tokens; 0 is all."""

    seed: int = 0
    """Seed of the sampling."""

    dtype: Dtype = "auto"
    """Compute in this dtype; auto takes the checkpoint's."""

    device: str = "auto"
    """Device to run on, for example cpu; auto takes an accelerator where there is one."""

    experts: str = "mogul"
    """Implementation of the experts: mogul, or one of Transformers' (eager, grouped_mm...)."""

    quantise: Quantise = "no"
    """Quantise on loading: fp8 experts and linear layers, fp8-all the head too, others experts."""

    statistics: str | None = None
    """Folder that `mogul calibrate --out` wrote, to round by; else the checkpoint's own, if any."""


def run(options: Options) -> int:
    """Talk until the person leaves."""
    o = options
    sampling = Sampling(o.max_new_tokens, o.temperature, o.top_p, o.top_k, o.seed)
    speaker = open_speaker(
        o.model,
        sampling,
        dtype=o.dtype,
        device=o.device,
        experts=o.experts,
        needs_template=True,
        quantise=o.quantise,
        statistics=o.statistics,
    )
    start: list[Message] = [{"role": "system", "content": o.system}] if o.system else []
    speaker.template_inputs([*start, {"role": "user", "content": "?"}])  # refused now, or never
    say("say something; /help shows the commands")
    converse(speaker, start)
    return 0


def converse(speaker: Speaker, start: list[Message]) -> None:
    """Read lines and answer them until the end of input or /quit."""
    messages = list(start)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if line == "/quit":
                return
            messages = _obey(line, messages, start)
        elif line:
            _answer(speaker, messages, line)


def _read_line() -> str | None:
    """Return the next line, "" after Ctrl-C, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        say("\n(/quit or Ctrl-D leaves)")
        return ""


def _obey(command: str, messages: list[Message], start: list[Message]) -> list[Message]:
    if command == "/reset":
        say("(the conversation starts anew)")
        return list(start)
    if command == "/help":
        say("\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items()))
    else:
        say(f"unknown command {command!r}: {nearest(command, COMMANDS)}")
    return messages


def _answer(speaker: Speaker, messages: list[Message], line: str) -> None:
    """Answer one line and keep both in `messages`; too long a conversation is only told."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        text = speaker.speak(speaker.template_inputs(asked))
    except Interrupted as stopped:
        say("(answer stopped)")
        text = stopped.text
    except ConfigError as error:
        say("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return
    messages[:] = [*asked, {"role": "assistant", "content": text}]
