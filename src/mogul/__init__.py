"""mogul trains, sizes, shrinks and serves mixture-of-experts language models.

Importing this package is light: rooms are loaded when they are first used.
`import mogul.models` registers the architectures and the "mogul" experts implementation
with Transformers.
"""

from __future__ import annotations

__version__ = "0.1.0"
