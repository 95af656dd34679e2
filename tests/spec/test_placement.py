"""Placement records: what they accept, give back and refuse."""

import json

import pytest

from mogul.core.errors import ArtifactError, ConfigError
from mogul.spec.placement import LayerPlacement, Placement, load_placement
from mogul.spec.trace import ModelStamp

STAMP = ModelStamp(name="m", family="moge", num_layers=2, num_experts=4, top_k=2, hidden_size=4)


def placement(slots, devices=2, slots_per_device=2):
    layer = LayerPlacement(
        layer=1,
        expert_of_slot=slots,
        method="swap",
        rho=1.1,
        rho_before=1.5,
        rho_bound=1.0,
        gap=0.1,
    )
    return Placement(
        model=STAMP,
        num_devices=devices,
        slots_per_device=slots_per_device,
        method="swap",
        layers=(layer,),
    )


def test_devices_and_round_trip(tmp_path):
    one = placement((2, 0, 3, 1))
    assert one.device_of_expert(1).tolist() == [0, 1, 0, 1]
    one.save(tmp_path / "p.json")
    assert load_placement(tmp_path / "p.json") == one


def test_replicas_and_empty_slots_are_seen():
    assert placement((0, 1, 2, 3, 0, -1), slots_per_device=3).has_replicas
    assert placement((0, 1, 2, 3, -1, -1), slots_per_device=3).has_empty_slots
    with pytest.raises(ConfigError, match="no single device"):
        placement((0, 1, 2, 3, 0, 1), slots_per_device=3).device_of_expert(1)
    with pytest.raises(ConfigError, match="no layer 0") as caught:
        placement((0, 1, 2, 3)).slots_of(0)
    assert "[1]" in caught.value.__notes__[0]


def test_impossible_layers_are_named():
    with pytest.raises(ConfigError, match=r"no slot for the experts \[3\]"):
        placement((0, 1, 2, 0))
    with pytest.raises(ConfigError, match="fills 3 slots"):
        placement((0, 1, 2))


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "p.json"
    file.write_text("{}")
    with pytest.raises(ArtifactError, match="is no placement"):
        load_placement(file)
    file.write_text(json.dumps({**placement((2, 0, 3, 1)).model_dump(), "schema_version": 7}))
    with pytest.raises(ArtifactError, match="schema version 7"):
        load_placement(file)
