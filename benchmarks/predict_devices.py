"""What grouping should buy at D devices, by the simulator's model: the experts layer, both routers.

python benchmarks/predict_devices.py --devices 2 4 8

Prints a Markdown table: modelled time of experts and exchange of one layer (H100, bf16), ungrouped
over grouped, with rho and delta of the ungrouped router (grouped: rho 1). Routing is uniform, or a
power law of exponent 0.5.
"""

from __future__ import annotations

import argparse

from mogul.simulate.engines import Engine
from mogul.simulate.operators import Step
from mogul.simulate.routing import LayerLoad, Routing
from mogul.simulate.run import Setting
from mogul.spec import presets
from mogul.spec.families import model_spec
from mogul.spec.grouping import Grouping
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel

MODELS = {"Pangu Pro": "pangu-pro-moe-72b", "Qwen3-30B-A3B": "qwen3-30b-a3b"}
GROUPS = 8
ROUTINGS = {"uniform": Routing(), "skewed": Routing(kind="power_law", alpha=0.5)}


def with_groups(model: ModelSpec, groups: int) -> ModelSpec:
    """The same model under another grouping."""
    assert model.moe is not None
    old = model.moe.grouping
    new = Grouping(num_experts=old.num_experts, num_groups=groups, top_k=old.top_k)
    return model.model_copy(update={"moe": model.moe.model_copy(update={"grouping": new})})


def layer(model: ModelSpec, devices: int, tokens: int, routing: Routing) -> tuple[float, LayerLoad]:
    """Seconds of experts and exchange of one layer, and its load."""
    engine = Engine(exchange="all_gather" if model.grouping.num_groups > 1 else "all_to_all")
    setting = Setting(
        model,
        hardware("h100"),
        Parallel(dp=devices, ep=devices, shared_tp=1),
        routing=routing,
        engine=engine,
    )
    each = -(-tokens // devices)
    time = setting.step_model().time(Step(sequences=each, new_tokens=1, context=1))
    parts = time.parts()
    seconds = parts["experts"] + parts.get("collectives", 0.0)
    return seconds / len(model.moe_layers), time.loads[0][1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 456, 4096, 16384])
    options = parser.parse_args()
    print("| model | routing | devices | " + " | ".join(map(str, options.tokens)) + " |")
    print("|---|---|---|" + "---|" * len(options.tokens))
    for name, preset in MODELS.items():
        model = model_spec(presets.config(preset))
        grouped, free = with_groups(model, GROUPS), with_groups(model, 1)
        for kind, routing in ROUTINGS.items():
            for devices in options.devices:
                cells = []
                for tokens in options.tokens:
                    best, _ = layer(grouped, devices, tokens, routing)
                    other, load = layer(free, devices, tokens, routing)
                    cells.append(f"{other / best:.2f} ({load.rho:.2f}, {load.delta:.2f})")
                print(f"| {name} | {kind} | {devices} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
