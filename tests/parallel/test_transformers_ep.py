"""mogul's dispatch under Transformers' own expert parallelism."""

from __future__ import annotations

import pytest
import ranks

from mogul.core.errors import BackendError
from mogul.parallel import launch
from mogul.parallel.transformers_ep import register

try:
    from transformers.distributed import expert_parallel
except ImportError:
    expert_parallel = None


@pytest.mark.skipif(expert_parallel is None, reason="this Transformers has no EPImplementation")
@pytest.mark.parametrize("options", [{"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}])
def test_equals_one_process(tmp_path, options):
    for errors in launch(
        ranks.transformers_ep, 2, str(tmp_path), options, on_cpu=True, threads=1, timeout_s=120
    ):
        assert len(errors) >= 4
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.skipif(expert_parallel is not None, reason="this Transformers has the interface")
def test_old_versions_are_refused_with_a_way_out():
    with pytest.raises(BackendError, match="no EPImplementation interface"):
        register()
