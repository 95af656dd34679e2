import pickle

import pytest

from mogul.core.errors import ArtifactError, BackendError, ConfigError, HardwareError, nearest


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (ConfigError, ValueError),
        (ArtifactError, ValueError),
        (HardwareError, RuntimeError),
        (BackendError, RuntimeError),
    ],
)
def test_errors_refine_standard_ones_and_survive_pickling(kind, standard):
    error = kind("8 picks of 4 experts", fix="lower the picks")
    assert isinstance(error, standard)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "8 picks of 4 experts"
    assert copy.__notes__ == ["fix: lower the picks"]


def test_an_error_without_a_fix_has_no_note():
    assert not hasattr(ConfigError("no"), "__notes__")


def test_nearest_names_the_closest_or_all():
    assert nearest("num_expert", ["num_experts", "top_k"]) == "did you mean 'num_experts'?"
    assert nearest("zzz", ["b", "a"]) == "use one of a, b"
