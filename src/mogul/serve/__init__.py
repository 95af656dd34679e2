"""The engine: a checkpoint becomes the fastest way to generate from it on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mogul.serve.engine import Engine
    from mogul.serve.params import SamplingParams, Structure
    from mogul.serve.requests import Answer, Chunk

__all__ = ["Answer", "Chunk", "Engine", "SamplingParams", "Structure"]

_HOME = {
    "Answer": "requests",
    "Chunk": "requests",
    "Engine": "engine",
    "SamplingParams": "params",
    "Structure": "params",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: most take torch with them."""
    if name not in _HOME:
        raise AttributeError(f"module 'mogul.serve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mogul.serve.{_HOME[name]}"), name)
