"""What grouping should buy at D devices, by the simulator's model: the experts layer, both routers.

python benchmarks/predict_devices.py --devices 2 4 8 --hardware h200

Prints a Markdown table: modelled time of experts and exchange of one layer (bf16) under the
ungrouped router over that under the grouped one with all-gather and reduce-scatter; the ungrouped
router by a deduplicating all-to-all / on the grouped one's own road, every rank masking. In
brackets its rho and delta (grouped: rho 1). Skewed draws are those of `bench_devices.py`.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Literal

import numpy as np

from mogul.bench.devices_cases import draw_picks, seeds_of
from mogul.bench.kernels import LayerShape
from mogul.simulate.engines import Engine
from mogul.simulate.operators import Step
from mogul.simulate.routing import LayerLoad, Routing
from mogul.simulate.run import Setting
from mogul.spec import balance, presets
from mogul.spec.families import model_spec
from mogul.spec.grouping import Grouping
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel

MODELS = {"Pangu Pro": "pangu-pro-moe-72b", "Qwen3-30B-A3B": "qwen3-30b-a3b"}
GROUPS, DRAWS, JUDGED_TOKENS = 8, 3, 4096
Exchange = Literal["all_gather", "all_to_all"]


def with_groups(model: ModelSpec, groups: int) -> ModelSpec:
    """The same model under another grouping."""
    assert model.moe is not None
    old = model.moe.grouping
    new = Grouping(num_experts=old.num_experts, num_groups=groups, top_k=old.top_k)
    return model.model_copy(update={"moe": model.moe.model_copy(update={"grouping": new})})


def skewed(model: ModelSpec, devices: int) -> Routing:
    """As uneven as the measured draws are on average."""
    shape = LayerShape(model.grouping.num_experts, model.grouping.top_k, 1, 1, GROUPS)
    device_E = np.arange(shape.experts) // (shape.experts // devices)

    def rho(seed: int) -> float:
        ids_TK = draw_picks(shape, 1, "skewed", JUDGED_TOKENS, seed)
        return balance.rho(balance.rows_per_device(ids_TK, device_E, devices))

    return Routing(spread=fmean(rho(seed) for seed in seeds_of(shape, "skewed", devices, DRAWS)))


def layer(
    model: ModelSpec, devices: int, tokens: int, routing: Routing, exchange: Exchange, on: str
) -> tuple[float, LayerLoad]:
    """Seconds of experts and exchange of one layer, and its load."""
    setting = Setting(
        model,
        hardware(on),
        Parallel(dp=devices, ep=devices, shared_tp=1),
        routing=routing,
        engine=Engine(exchange=exchange),
    )
    each = -(-tokens // devices)
    time = setting.step_model().time(Step(sequences=each, new_tokens=1, context=1))
    parts = time.parts()
    seconds = parts["experts"] + parts.get("collectives", 0.0)
    return seconds / len(model.moe_layers), time.loads[0][1]


def cell(model: ModelSpec, devices: int, tokens: int, routing: Routing, on: str) -> str:
    """Both ungrouped ways over the grouped one."""
    grouped, free = with_groups(model, GROUPS), with_groups(model, 1)
    best, _ = layer(grouped, devices, tokens, Routing(), "all_gather", on)
    moved, _ = layer(free, devices, tokens, routing, "all_to_all", on)
    same, load = layer(free, devices, tokens, routing, "all_gather", on)
    return f"{moved / best:.2f} / {same / best:.2f} ({load.rho:.2f}, {load.delta:.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 456, 4096, 16384])
    parser.add_argument("--hardware", default="h100")
    options = parser.parse_args()
    print("| model | routing | devices | " + " | ".join(map(str, options.tokens)) + " |")
    print("|---|---|---|" + "---|" * len(options.tokens))
    for name, preset in MODELS.items():
        model = model_spec(presets.config(preset))
        for kind in ("uniform", "skewed"):
            for devices in options.devices:
                routing = Routing() if kind == "uniform" else skewed(model, devices)
                cells = [
                    cell(model, devices, tokens, routing, options.hardware)
                    for tokens in options.tokens
                ]
                print(f"| {name} | {kind} | {devices} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
