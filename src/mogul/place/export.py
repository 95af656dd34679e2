"""Placements in the formats of serving engines.

* SGLang, `--init-expert-location FILE`: {"physical_to_logical_map": [layers][slots]}, one row for
  every decoder layer (dense ones hold the identity), ranks own consecutive equal runs of slots.
* vLLM: the arrays of its load balancer's state, one row for every layer with experts:
  physical_to_logical_map, logical_to_physical_map padded with -1, logical_replica_count.
* vLLM on Ascend, `expert_map_path`: moe_layer_count and, for every layer with experts, the list of
  devices with their experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mogul.core.errors import ConfigError, nearest
from mogul.place.problem import replica_counts
from mogul.spec.placement import Placement

FORMATS = ("sglang", "vllm", "vllm-ascend")


def export(placement: Placement, format: str) -> dict[str, Any]:
    """The JSON object that an engine reads.

    Raises:
        ConfigError: An unknown format, or empty slots (engines want every slot filled).
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}", fix=nearest(format, FORMATS))
    if placement.has_empty_slots:
        raise ConfigError(
            f"{format} fills every slot, and this placement leaves some empty",
            fix="use a number of devices that divides the experts and replicas together",
        )
    writers = {"sglang": _sglang, "vllm": _vllm, "vllm-ascend": _vllm_ascend}
    return writers[format](placement)


def _sglang(placement: Placement) -> dict[str, Any]:
    num_slots = placement.num_devices * placement.slots_per_device
    rows = [
        [slot % placement.model.num_experts for slot in range(num_slots)]
        for _ in range(placement.model.num_layers)
    ]
    for one in placement.layers:
        rows[one.layer] = list(one.expert_of_slot)
    return {"physical_to_logical_map": rows}


def _vllm(placement: Placement) -> dict[str, Any]:
    experts = placement.model.num_experts
    slots = [np.array(one.expert_of_slot) for one in placement.layers]
    count_LE = np.stack([replica_counts(one, experts) for one in slots])
    to_slot_LER = np.full((len(slots), experts, int(count_LE.max())), -1)
    for layer, expert_P in enumerate(slots):
        for expert in range(experts):
            found = np.flatnonzero(expert_P == expert)
            to_slot_LER[layer, expert, : len(found)] = found
    return {
        "physical_to_logical_map": [one.tolist() for one in slots],
        "logical_to_physical_map": to_slot_LER.tolist(),
        "logical_replica_count": count_LE.tolist(),
    }


def _vllm_ascend(placement: Placement) -> dict[str, Any]:
    layers = [
        {
            "layer_id": index,
            "device_count": placement.num_devices,
            "device_list": [
                {"device_id": device, "device_expert": experts.tolist()}
                for device, experts in enumerate(placement.slots_of(one.layer))
            ],
        }
        for index, one in enumerate(placement.layers)
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}
