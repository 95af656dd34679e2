"""Act 1, exact: the upcycled model computes what the dense model computes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from mogul.bench.demo.cast import DemoSettings, Name
from mogul.core.log import say
from mogul.train.data import shipped_text


@dataclass(frozen=True)
class Answer:
    """One prompt and what both models wrote, greedily."""

    prompt: str
    dense: str
    moge: str
    same_tokens: bool
    new_tokens: int


@dataclass(frozen=True)
class ExactResult:
    """Act 1: logit differences in fp32 and answers."""

    largest_logit_difference: dict[Name, float]
    """MoGE and twin against the dense model."""
    largest_logit: float
    """Largest |logit| of the dense model: what the differences are to be measured by."""
    rounding: float
    """Largest difference of the dense model to itself with its products in fp64."""
    tokens_compared: int
    top_token_agrees: dict[Name, float]
    """Share of positions (0..1) whose most likely next token is that of the dense model."""
    answers: tuple[Answer, ...]


def act_exact(
    dense: Any, moge: Any, twin: Any, tokenizer: Any, settings: DemoSettings
) -> ExactResult:
    """Compare logits on prompts and text, then let dense model and MoGE answer the prompts."""
    prompts = [_chat_ids(tokenizer, prompt) for prompt in settings.prompts]
    text = shipped_text().held_out[0][:1200]
    prose = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    compared = [*prompts, prose[:, :128]]
    difference: dict[Name, float] = {"MoGE": 0.0, "twin": 0.0}
    agreed: dict[Name, int] = {"MoGE": 0, "twin": 0}
    largest = 0.0
    rounding = 0.0
    precise = copy.deepcopy(dense).double()
    with torch.inference_mode():
        for ids_1L in compared:
            want = dense(input_ids=ids_1L, use_cache=False).logits
            largest = max(largest, float(want.abs().max()))
            truth = precise(input_ids=ids_1L, use_cache=False).logits
            rounding = max(rounding, float((want - truth).abs().max()))
            others: tuple[tuple[Name, Any], ...] = (("MoGE", moge), ("twin", twin))
            for name, model in others:
                got = model(input_ids=ids_1L, use_cache=False).logits
                difference[name] = max(difference[name], float((got - want).abs().max()))
                agreed[name] += int((got.argmax(-1) == want.argmax(-1)).sum())
    del precise
    tokens = sum(ids_1L.shape[1] for ids_1L in compared)
    return ExactResult(
        largest_logit_difference=difference,
        largest_logit=largest,
        rounding=rounding,
        tokens_compared=tokens,
        top_token_agrees={name: count / tokens for name, count in agreed.items()},
        answers=_answers(dense, moge, tokenizer, prompts, settings),
    )


def _chat_ids(tokenizer: Any, prompt: str) -> Tensor:
    """The prompt as a chat where the tokenizer has a template, else as it is; ids [1, L]."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def _answers(
    dense: Any, moge: Any, tokenizer: Any, prompts: Sequence[Tensor], settings: DemoSettings
) -> tuple[Answer, ...]:
    answers = []
    for prompt, ids_1L in zip(settings.prompts, prompts, strict=True):
        say(f"  prompt: {prompt}")
        ids = [
            _generate(model, name, tokenizer, ids_1L, settings.new_tokens)
            for name, model in (("dense", dense), ("MoGE", moge))
        ]
        texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in ids]
        answers.append(Answer(prompt, texts[0], texts[1], torch.equal(*ids), len(ids[1])))
    return tuple(answers)


def _generate(model: Any, name: str, tokenizer: Any, ids_1L: Tensor, new_tokens: int) -> Tensor:
    """Continue greedily, the words appearing on standard error as they come; ids [new]."""
    sys.stderr.write(f"  {name + ':':7} ")
    written = model.generate(
        ids_1L,
        attention_mask=torch.ones_like(ids_1L),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        streamer=_Voice(tokenizer),
    )
    return written[0, ids_1L.shape[1] :]


class _Voice(TextStreamer):
    """Writes words to standard error on one line, since standard output is for results."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stderr.write(text.replace("\n", " ") + ("\n" if stream_end else ""))
        sys.stderr.flush()
