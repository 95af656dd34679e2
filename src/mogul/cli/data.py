"""`mogul data`: the table of its verbs; each is a module of its own."""

from __future__ import annotations

SUBVERBS = {
    "build": ("mogul.cli.data_build", "text -> token shards with a held-out part"),
    "check": ("mogul.cli.data_check", "what a token folder holds; names damaged shards"),
}

EXAMPLES = """
examples:
  mogul data build corpus/ --out tokens --vocab-size 16384
  mogul data build documents.jsonl --out tokens --tokenizer ./SmolLM2-135M
  mogul data build shipped --out tokens --vocab-size 4096 --held-out-by position --held-out 0.1
  mogul data check tokens
"""
