"""Ideas for the fixed shape's training step, one laid over the step at a time, or some together.

python benchmarks/gpu/train_ideas.py --out ideas.jsonl --rounds 3 base router router+head

Predicted before the first run (48 rows of 2,048 tokens, AdamW, one H100: 366 ms, 38.3 % MFU):

- router: logits of bfloat16 factors with a float32 sum, so that no float32 copy of the hidden
  states is written or read; the gradient of the logits is rounded to bfloat16. -8 ms.
- qkv: queries, keys and values as one product of width 3,072; one product instead of three and two
  sums for the gradient of its input. -7 ms.
- head: the head's gradient is summed by the product itself (then also in chunks twice as large).
  -2.5 ms.
- all: the three together. 349 ms, 40.1 %; with 60 rows 0.4 points more.

Found, each once and one after the other on a card that grew warm (its unchanged kernels slowed by
2 to 3 %): base 372.0 ms, all 379.9, router 369.3, qkv 385.5, head 380.8; all with 60 rows 467.6.
By their kernels: router about -10 ms and 6 GiB less, head -1, qkv +11 to +14 (what joins the three
gradients takes 19 ms, more than the two sums that it spares).

Router and head were kept, qkv was not: `base` is the step without all three.
Predicted before the second run, variants taking turns: router+head -11 ms (38.9 % on that card),
with 72 rows another 1.2 % faster a token.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mogul.models
from mogul.models.moge.attention import MogeAttention, eager_attention_forward
from mogul.models.moge.rotary import rotate
from mogul.models.moge.router import MogeRouter
from mogul.train import objective
from mogul.train.routers import TrainedRouter

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_train

PLAIN_ATTENTION = MogeAttention.forward
TODAY = {"router": TrainedRouter.product, "head": objective._add_product}
"""What was kept of the ideas; without it: what stood there before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", help="base, or router, qkv, head joined by +; `:60`")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="variants take turns so often")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many")
    options = parser.parse_args()
    mogul.models.register()
    start_s = time.monotonic()
    for index, variant in enumerate(turns(options.variants, options.rounds)):
        if time.monotonic() - start_s > options.seconds:
            print(f"no time for {variant}", flush=True)
            continue
        name, _, rows = variant.partition(":")
        try:
            line = run(name, int(rows or 48), options.steps, splits=index < len(options.variants))
        except Exception as error:
            traceback.print_exc()
            line = {"error": str(error)[:300]}
        print(json.dumps({"variant": variant, **line}), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({"variant": variant, **line}) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


def turns(variants: list[str], rounds: int) -> list[str]:
    """Every second round backwards: a card that grows warm then slows all variants alike."""
    return [one for turn in range(rounds) for one in variants[:: -1 if turn % 2 else 1]]


def run(name: str, rows: int, steps: int, *, splits: bool) -> dict[str, Any]:
    """Time the step of one variant."""
    torch._dynamo.reset()
    objective._softmax_step.cache_clear()
    chosen = set(name.split("+"))
    TrainedRouter.product = TODAY["router"] if "router" in chosen else wide_logits
    MogeAttention.forward = joint_attention if "qkv" in chosen else PLAIN_ATTENTION
    objective._add_product = TODAY["head"] if "head" in chosen else add_rounded_product
    options = argparse.Namespace(
        case="fixed", rows=rows, accumulation=1, steps=steps, attention="cudnn", float8="none",
        no_compile=False, no_split=not splits,
    )  # fmt: skip
    return bench_train.bench_ours(options, "adamw")


def wide_logits(self: Any, x: Tensor) -> Tensor:
    """The product of wide copies."""
    return MogeRouter.product(self, x)


def add_rounded_product(total_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:
    """The product is rounded before it is added."""
    total_VD += dlogits_CV.mT @ x_CD


def joint_attention(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """`MogeAttention.forward` in training, its first three products as one."""
    batch_length = hidden_states.shape[:-1]
    layers = (self.q_proj, self.k_proj, self.v_proj)
    joint = F.linear(hidden_states, torch.cat([layer.weight for layer in layers]))
    query, key, value = (
        part.view(*batch_length, -1, self.head_dim)
        for part in joint.split([layer.out_features for layer in layers], -1)
    )
    query = query if self.q_norm is None else self.q_norm(query)
    key = key if self.k_norm is None else self.k_norm(key)
    interleaved = self.config.rope_interleaved
    query, key = (
        rotate(x, *position_embeddings, interleaved=interleaved).transpose(1, 2)
        for x in (query, key)
    )
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )
    kwargs.pop("past_key_values", None)
    out, chances = attend(
        self, query, key, value.transpose(1, 2), attention_mask, dropout=0.0,
        scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
    )  # fmt: skip
    return self.o_proj(out.reshape(*batch_length, -1).contiguous()), chances


if __name__ == "__main__":
    main()
