"""Placements in the words of serving engines."""

import numpy as np
import pytest

from mogul.core.errors import ConfigError
from mogul.place.export import export
from mogul.spec.placement import LayerPlacement, Placement
from mogul.spec.trace import ModelStamp

SLOTS = (2, 0, 3, 3, 1, 0)


def placement(slots=SLOTS):
    layer = LayerPlacement(
        layer=1,
        expert_of_slot=slots,
        method="swap",
        rho=1.0,
        rho_before=1.2,
        rho_bound=1.0,
        gap=0.0,
    )
    stamp = ModelStamp(
        name="m", family="deepseek_v3", num_layers=2, num_experts=4, top_k=2, hidden_size=4
    )
    return Placement(model=stamp, num_devices=2, slots_per_device=3, method="swap", layers=(layer,))


def test_sglang_has_a_row_for_every_decoder_layer():
    rows = export(placement(), "sglang")["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3, 0, 1], list(SLOTS)]


def test_sglang_reads_nothing_else():
    """Its loader passes every key of the file on to a function that takes this one alone."""
    out = export(placement(), "sglang")
    assert set(out) == {"physical_to_logical_map"}
    rows = np.array(out["physical_to_logical_map"])
    assert rows.shape == (2, 6)  # a row a layer, experts and copies; ranks hold equal runs
    assert all(set(row) == {0, 1, 2, 3} for row in rows.tolist())


def test_vllm_maps_agree_with_each_other():
    out = export(placement(), "vllm")
    assert out["physical_to_logical_map"] == [list(SLOTS)]
    assert out["logical_replica_count"] == [[2, 1, 1, 2]]
    to_slot = np.array(out["logical_to_physical_map"][0])
    assert to_slot.tolist() == [[1, 5], [4, -1], [0, -1], [2, 3]]


def test_vllm_ascend_lists_devices():
    out = export(placement(), "vllm-ascend")
    assert out["moe_layer_count"] == 1
    assert out["layer_list"][0]["device_list"][1] == {"device_id": 1, "device_expert": [3, 1, 0]}


def test_empty_slots_and_unknown_formats_are_refused():
    with pytest.raises(ConfigError, match="leaves some empty"):
        export(placement((2, 0, 3, 1, -1, -1)), "sglang")
    with pytest.raises(ConfigError, match="unknown format 'trt'"):
        export(placement(), "trt")
