"""PEFT: LoRA on attention and on the stacked expert parameters trains and merges."""

from __future__ import annotations

import pytest
import torch

from mogul.models import load_model

peft = pytest.importorskip("peft", reason="peft is not installed")

TOKENS = torch.arange(1, 33).repeat(2, 1)


def lora(model):
    names = ["q_proj", "v_proj"]
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, target_parameters=stacked),
    )


@pytest.mark.parametrize("experts", ["mogul", "eager"])
def test_lora_trains_and_merges(exported, experts):
    torch.manual_seed(0)
    base = load_model(exported, dtype="float32", experts=experts)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = lora(base).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained)
    assert any("experts" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    # Every adapter moved, those of the experts too.
    still = [n for n, p in trained.items() if "lora_B" in n and not p.any()]
    assert not still
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=TOKENS).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, adapted, atol=1e-4, rtol=1e-4)
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    for part in ("self_attn.q_proj", "experts.gate_up_proj", "experts.down_proj"):
        assert any(part in name for name in changed)
    assert not any("gate.weight" in name or "embed" in name for name in changed)


def test_merged_weights_are_saved_in_our_layout(exported, tmp_path):
    model = lora(load_model(exported, dtype="float32"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
        merged = model.merge_and_unload().eval()
        merged.save_pretrained(tmp_path)
        again = load_model(tmp_path, dtype="float32")
        torch.testing.assert_close(
            again(TOKENS).logits, merged(TOKENS).logits, atol=1e-5, rtol=1e-5
        )
