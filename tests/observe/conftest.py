"""What several tests of observers ask of a model."""

import pytest


@pytest.fixture
def num_hooks():
    """The hooks that stand on a model and its parts."""
    return lambda model: sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )
