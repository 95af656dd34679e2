"""An exported checkpoint is read by plain Transformers and gives the same logits."""

from __future__ import annotations

import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mogul.models import load_model

TEXT = "The router picks one expert in every group."


@torch.no_grad()
def test_auto_classes_read_the_export(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == TEXT
    ours = load_model(exported, dtype="float32")
    torch.testing.assert_close(model(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)


def test_code_beside_the_weights_serves_tools_that_do_not_know_us(exported, tmp_path):
    """A new interpreter that never imports mogul itself loads the folder and generates."""
    from mogul.train.export import export

    folder = export(load_model(exported), tmp_path / "with", tokenizer=exported, with_code=True)
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(folder)!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer('a', return_tensors='pt')['input_ids']\n"
        "print(model.generate(ids, max_new_tokens=3, do_sample=False).shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("2", "3", "4")  # an early end of text counts
