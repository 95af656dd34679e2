"""Compiles tiny models whole, their experts on the Triton kernels in Triton's interpreter (CPU).

A process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import transformers

import mogul.models
from mogul.kernels.moe import MOE_FORWARD
from mogul.kernels.triton import layer, moe_forward_triton, plans

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_experts": 8,
    "moe_intermediate_size": 24, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Qwen3Moe": {"head_dim": 8},
    "Moge": {"router_n_groups": 2, "shared_expert_intermediate_size": 8},
}
TILE = plans.Tile(n=32, k=32, warps=4, stages=2)


def main() -> None:
    """One JSON object: family -> [nodes of ours in the graph, equal to the plain forward]."""
    layer.plan_for = lambda shape, tokens: plans.Plan(rows=16, up=TILE, down=TILE)
    MOE_FORWARD.add("triton", moe_forward_triton)  # now without its refusal of the CPU
    found = {}
    for family, more in FAMILIES.items():
        torch.manual_seed(0)
        home = mogul.models if family == "Moge" else transformers
        config = getattr(home, family + "Config")(**COMMON, **more)
        model = getattr(home, family + "ForCausalLM")(config).eval()
        model.set_experts_implementation("mogul")
        graphs: list[str] = []

        def keep(
            graph: torch.fx.GraphModule, _inputs: object, graphs: list[str] = graphs
        ) -> object:
            graphs.append(graph.code)
            return graph.forward

        ids = torch.randint(1, 60, (1, 9))
        with torch.no_grad():
            plain = model(ids, use_cache=False).logits
            given = torch.compile(model, fullgraph=True, backend=keep)(ids, use_cache=False).logits
        nodes = sum(code.count("torch.ops.mogul.moe(") for code in graphs)
        found[family] = [len(graphs), nodes, torch.allclose(given, plain, rtol=0, atol=1e-6)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
