"""Two processes with Transformers' own parallel plans compute what one process computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from mogul.models import MogeConfig, MogeForCausalLM

folder, options = Path(sys.argv[1]), eval(sys.argv[2])
tokens = torch.arange(16).reshape(2, 8) * 3 % 64
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    torch.manual_seed(0)
    MogeForCausalLM(MogeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=4, router_n_groups=4,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, router_selection_bias=True,
        router_scale=True, attention_bias=True, attention_output_bias=True, use_qk_norm=True,
        mlp_only_layers=[0], intermediate_size=32, initializer_range=0.2,
    )).save_pretrained(folder / "one")
dist.barrier()

def step(path, **more):
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="mogul", **more)
    loss = model.train()(tokens, labels=tokens, output_router_logits=True).loss
    loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return model, loss.item(), grads

_, loss, grads = step(folder / "one")
model, given, given_grads = step(
    folder / "one", distributed_config=DistributedConfig(**options)
)
assert abs(given - loss) < 1e-5, (given, loss)
for name in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"):
    torch.testing.assert_close(given_grads[name], grads[name], atol=1e-5, rtol=1e-3)
model.save_pretrained(folder / "copy")
dist.barrier()
assert abs(step(folder / "copy")[1] - loss) < 1e-5
dist.barrier()
"""

LAYOUTS = ["fsdp_size=2", "tp_size=2", "fsdp_size=2, ep_size=2", "tp_size=2, ep_size=2"]


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(tmp_path, layout):
    from transformers.distributed import DistributedConfig

    fields = getattr(DistributedConfig, "__dataclass_fields__", {})
    if "ep_size" in layout and "ep_size" not in fields:
        pytest.skip("this version of Transformers has no ep_size")
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launch, str(script), str(tmp_path), f"dict({layout})"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
