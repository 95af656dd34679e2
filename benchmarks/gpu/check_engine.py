"""Does a whole quantised engine say what one plain forward of the same weights says?

Random weights of a model's shape amplify rounding until, 48 layers deep, nothing can be compared.
Here every branch (attention, feed-forward, experts) is damped and the embedding has unit variance,
as in a model that trains: a change of the input stays as large as it was. Three numbers stand
beside each other: the engine (compiled, captured, paged) against the plain forward; the plain
forward against itself with an input changed by bf16's rounding, which is the noise; and the plain
forward with the branches of one layer turned round, which is what one wrong layer would show.

    python benchmarks/gpu/check_engine.py --preset pangu-pro-moe-72b --quantise fp8 --kv fp8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bench_engine
import torch
from torch import Tensor

from mogul.bench import ledger
from mogul.models.quantise import PackedExperts
from mogul.serve import SamplingParams
from mogul.serve.engine import Engine
from mogul.serve.graphs import decoder_layers
from mogul.serve.options import EngineOptions

LAST = ("o_proj", "down_proj")


def read_options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="pangu-pro-moe-72b")
    parser.add_argument("--layers", type=int, default=0, help="0: all")
    parser.add_argument("--quantise", default=None)
    parser.add_argument("--kv-dtype", "--kv", default="auto")
    parser.add_argument("--branch", type=float, default=0.07, help="factor of every branch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[7, 333, 2048])
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", default=".")
    return parser.parse_args()


def last_scales(layer: Any) -> list[Tensor]:
    """What multiplies all that the branches of a decoder layer add, quantised or not."""
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, PackedExperts):
            found.append(module.down_scale)
        elif name.rpartition(".")[2] in LAST:
            found.append(module.scale if hasattr(module, "scale") else module.weight)
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            found += [module.down_proj] if isinstance(module.down_proj, Tensor) else []
    return found


@torch.no_grad()
def damp(model: Any, factor: float) -> None:
    """Small branches on an embedding of unit variance."""
    for layer in decoder_layers(model):
        for scale in last_scales(layer):
            scale.mul_(factor)
    weight = model.get_input_embeddings().weight
    weight.div_(weight.float().square().mean().sqrt().to(weight.dtype))


def logits_of(model: Any, tokens: Tensor, rows: int) -> Tensor:
    """Logits of the last rows but one of one plain forward."""
    with torch.inference_mode():
        return model(tokens, logits_to_keep=rows + 1, use_cache=False).logits[0, :-1].float()


class Shaken:
    """Inside, the embedding's output differs by the rounding of bf16: up to one part in 256."""

    def __init__(self, model: Any) -> None:
        self.table = model.get_input_embeddings()

    def __enter__(self) -> None:
        def shake(_module: Any, _args: Any, out: Tensor) -> Tensor:
            return out * (1 + (torch.rand_like(out, dtype=torch.float32) - 0.5) / 128).to(out.dtype)

        self.hook = self.table.register_forward_hook(shake)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


class Turned:
    """Inside, the branches of one layer have the other sign."""

    def __init__(self, model: Any) -> None:
        layers = decoder_layers(model)
        self.scales = last_scales(layers[len(layers) // 2])

    def __enter__(self) -> None:
        self._turn()

    def __exit__(self, *_: object) -> None:
        self._turn()

    def _turn(self) -> None:
        for scale in self.scales:
            scale.data.neg_()


def compare(got: Tensor, want: Tensor, picked: Tensor) -> dict[str, float]:
    """Log-probabilities of the picked tokens and likeliest tokens of two forwards."""
    a, b = (x.log_softmax(-1).gather(1, picked[:, None])[:, 0] for x in (got, want))
    return {
        "logprob_rms": round(float((a - b).square().mean().sqrt()), 4),
        "logprob_gap": round(float((a - b).abs().max()), 4),
        "same_top": round(float((got.argmax(-1) == want.argmax(-1)).float().mean()), 3),
    }


def check(engine: Engine, options: Any) -> list[dict[str, Any]]:
    """One row a prompt."""
    dice = torch.Generator().manual_seed(3)
    vocab = engine.runner.vocab_size
    prompts = [torch.randint(0, vocab, (n,), generator=dice).tolist() for n in options.lengths]
    params = SamplingParams(
        max_tokens=options.output, temperature=1.0, seed=1, logprobs=0, ignore_eos=True
    )
    answers = engine.generate(prompts, params)
    engine.check()
    model = bench_engine.uncompile(engine)
    model.set_attn_implementation(bench_engine.plain_attention(options))
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([[*prompt, *answer.token_ids]], device=model.device)
        picked, count = tokens[0, len(prompt) :], len(answer.token_ids)
        want = logits_of(model, tokens, count)
        logprobs = want.log_softmax(-1).gather(1, picked[:, None])[:, 0]
        got = torch.tensor([one.logprob for one in answer.logprobs or ()], device=model.device)
        with Shaken(model):
            noise = compare(logits_of(model, tokens, count), want, picked)
        with Turned(model):
            wrong = compare(logits_of(model, tokens, count), want, picked)
        rows.append(
            {
                "prompt": len(prompt),
                "finish": answer.finish,
                "engine": {
                    "logprob_rms": round(float((got - logprobs).square().mean().sqrt()), 4),
                    "logprob_gap": round(float((got - logprobs).abs().max()), 4),
                },
                "noise": noise,
                "one_wrong_layer": wrong,
                "logits_std": round(float(want.std()), 3),
            }
        )
        bench_engine.note(options, kind="confirmed", **rows[-1])
    model.set_attn_implementation("mogul_paged")
    return rows


def main() -> None:
    options = read_options()
    model = bench_engine.model_of(options, "shape_check")
    damp(model, options.branch)
    length = max(options.lengths) + options.output
    sequences = len(options.lengths)
    engine = Engine(
        model,
        None,
        EngineOptions(
            max_length=length,
            max_sequences=sequences,
            step_tokens=4096,
            cache_tokens=sequences * (length + 16),
            reuse_prefix=False,
            compile=not options.no_compile,
            graphs=not options.no_graphs,
            graph_sizes=(1, sequences),
            kv_dtype=options.kv_dtype,
        ),
    )
    rows = check(engine, options)
    if options.record:
        layers = engine.runner.model.config.num_hidden_layers
        kind = f"{options.quantise or 'bf16'} weights, KV {options.kv_dtype}"
        rows = [
            ledger.row(
                device=torch.cuda.get_device_name(), bench="engine_check",
                case=f"{options.preset} ({layers} layers), {kind}, prompt {row['prompt']}",
                metric="log-probability, engine against plain forward", unit="rms",
                value=row["engine"]["logprob_rms"], runs=1, noise=row["noise"]["logprob_rms"],
                one_wrong_layer=row["one_wrong_layer"]["logprob_rms"],
                note=f"branches times {options.branch}",
            )
            for row in rows
        ]  # fmt: skip
        ledger.append(rows, Path(options.out) / "ledger.jsonl")


if __name__ == "__main__":
    main()
