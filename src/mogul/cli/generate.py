"""`mogul generate`: continue one prompt, streaming to standard output."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mogul.cli.generation import Dtype, Interrupted, Quantise, Sampling, open_speaker
from mogul.core.log import say

EXAMPLES = """
examples:
  mogul generate nano --prompt "The word is"
  mogul generate ./moge --prompt "The capital of France is"
  mogul generate ./moge --prompt "Why is the sky blue?" --chat
  mogul generate ./moge --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
  echo "A long text" | mogul generate ./moge --prompt -  > out.txt
"""


@dataclass(frozen=True)
class Options:
    """Continue a prompt. The text goes to standard output, everything else to standard error."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Checkpoint folder, nano or nano-topk (carried, no download), or hub id."""

    prompt: str
    """Text to continue, as it stands; - reads it from standard input."""

    chat: bool = False
    """Wrap the prompt in the tokenizer's chat template, as one user message."""

    max_new_tokens: int = 128
    """Tokens to say at most."""

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
    """Stream the continuation; 130 when interrupted."""
    o = options
    sampling = Sampling(o.max_new_tokens, o.temperature, o.top_p, o.top_k, o.seed)
    text = sys.stdin.read().rstrip("\n") if o.prompt == "-" else o.prompt
    speaker = open_speaker(
        o.model,
        sampling,
        dtype=o.dtype,
        device=o.device,
        experts=o.experts,
        needs_template=o.chat,
        quantise=o.quantise,
        statistics=o.statistics,
    )
    message = {"role": "user", "content": text}
    try:
        speaker.speak(speaker.template_inputs([message]) if o.chat else speaker.plain_inputs(text))
    except Interrupted:
        say("interrupted")
        return 130
    return 0
