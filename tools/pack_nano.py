"""Turn a finished run of recipes/nano*.toml into a carried model: src/mogul/models/nano/NAME.

python tools/pack_nano.py runs/nano nano --tokenizer tokens/tokenizer

Keeps config, bf16 weights, a compact tokenizer, the recipe and the log, and writes the card with
what was measured: held-out bits per byte and balance from the log, and how often the MTP layer
guesses the token the model would choose (on the shipped text).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import mogul.models  # noqa: F401 - registers the architectures
from mogul.models.load import load_model, load_tokenizer
from mogul.train.data import shipped_text, token_windows
from mogul.train.evaluate import held_out_loss

TARGET = Path(__file__).parent.parent / "src" / "mogul" / "models" / "nano"
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 0,
            "pad_token_id": 0, "bos_token_id": 0}  # fmt: skip
LENGTH = 256


def main() -> int:
    """Write the folder and its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the finished run")
    parser.add_argument("name", choices=("nano", "nano-topk"))
    parser.add_argument("--tokenizer", type=Path, required=True)
    options = parser.parse_args()
    folder = TARGET / options.name
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = AutoModelForCausalLM.from_pretrained(options.run / "model", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        values = json.loads((options.tokenizer / name).read_text(encoding="utf-8"))
        compact = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        (folder / name).write_text(compact + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING, indent=2) + "\n")
    recipe = json.loads((options.run / "recipe.json").read_text(encoding="utf-8"))
    recipe.pop("command", None)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text(card(options.name, folder, json.loads(lines[-1]), recipe))
    print((folder / "README.md").read_text())
    return 0


@torch.no_grad()
def agreement(model: Any, ids_BL: torch.Tensor) -> float:
    """Share of positions where the MTP layer guesses the model's own choice, next token given."""
    out = model.model(ids_BL)
    own = model.lm_head(out.last_hidden_state).argmax(-1)
    guess = model.mtp(out.last_hidden_state[:, :-1], ids_BL[:, 1:]).argmax(-1)
    return float((guess == own[:, 1:]).float().mean())


def card(name: str, folder: Path, last: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The model card."""
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    windows = token_windows(shipped_text().held_out, tokenizer, LENGTH).spread(64)
    loss = held_out_loss(model, windows)
    guessed = agreement(model, torch.from_numpy(windows.ids))
    config: Any = model.config
    run = recipe["recipe"]["run"]
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    groups = config.router_n_groups
    routing = f"{groups} groups, {config.num_experts_per_tok // groups} pick a group"
    if groups == 1:
        routing = f"plain top-{config.num_experts_per_tok}"
    kept = ("max_vio", "max_vio_in_groups", "dead_experts", "rho_2", "rho_4", "delta_2", "delta_4")
    balance = ", ".join(f"{key} {last[key]:.3g}" for key in kept if key in last)
    return f"""---
license: apache-2.0
language: en
---
# {name}

{model.num_parameters():,} parameters in bf16, {size:.2f} MB with tokenizer and log. \
{config.num_hidden_layers} layers of {config.num_experts} experts ({routing}), hidden size \
{config.hidden_size}, vocabulary {config.vocab_size}, one multi-token-prediction layer, \
embedding and head tied.

It carries tests and first steps: it has read 55 MB of English documentation and knows nothing.

| measured | |
|---|---|
| held-out bits per byte, Debian documentation | {last["bits_per_byte"]:.4f} |
| bits per byte, the public-domain works mogul ships (never trained on) | {loss.bits_per_byte:.4f} |
| MTP guess = the model's own choice, next token given, same works | {guessed:.1%} |
| balance of the last log interval | {balance} |

Trained by `mogul train recipes/{name}.toml` for {run["steps"]} steps of \
{run["batch_size"] * run["sequence_length"] * run["accumulation"]:,} tokens \
({last["tokens"] / 1e6:.0f}M) on {recipe_device(recipe)}; recipe in `recipe.json`, log in \
`metrics.jsonl`. Text: half of the documents of `tools/debian_text.py` (`--share 0.5`, 18M tokens; \
tokenizer trained on all of it), see docs/data.md.
"""


def recipe_device(recipe: dict[str, Any]) -> str:
    """The device and versions of the run."""
    versions = recipe.get("versions", {})
    return f"one H100 (torch {versions.get('torch', '?')})"


if __name__ == "__main__":
    sys.exit(main())
