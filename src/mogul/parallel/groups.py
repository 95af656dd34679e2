"""Process groups of a layout: who shares attention, experts, the shared expert, and gradients.

Ranks of a stage are numbered so that the `tp` ranks of one attention are neighbours, and so are the
`moe_tp` ranks of one expert: within a node first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from mogul.core.errors import ConfigError
from mogul.spec.parallel import Parallel


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups this rank belongs to."""

    parallel: Parallel
    stage: dist.ProcessGroup
    tp: dist.ProcessGroup
    dp: dist.ProcessGroup

    @property
    def shared(self) -> dist.ProcessGroup:
        """Ranks that cut the shared expert; only where it is cut."""
        return self.stage if self.parallel.shared_ranks == self.stage.size() else self.tp


def make_groups(parallel: Parallel) -> Groups:
    """Build the groups over all ranks; every rank must call.

    Raises:
        ConfigError: The layout needs another number of ranks.
    """
    world = dist.get_world_size()
    if parallel.devices != world:
        raise ConfigError(
            f"the layout {parallel.describe()} needs {parallel.devices} ranks, there are {world}",
            fix=f"start {parallel.devices} ranks, or make tp x dp = {world}",
        )
    stage = dist.group.WORLD
    assert stage is not None
    tp, dp = parallel.tp, parallel.dp
    rows = [[d * tp + t for t in range(tp)] for d in range(dp)]
    columns = [[d * tp + t for d in range(dp)] for t in range(tp)]
    return Groups(parallel, stage, _own(rows, stage), _own(columns, stage))


def node_groups(
    group: dist.ProcessGroup, node_ranks: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(the ranks of this node, the ranks of its place on every node); every rank must call.

    Raises:
        ConfigError: The ranks do not fill nodes, or are not all ranks there are.
    """
    size = group.size()
    if size != dist.get_world_size() or size % node_ranks:
        raise ConfigError(
            f"{size} of {dist.get_world_size()} ranks do not fill nodes of {node_ranks}",
            fix="spread over all ranks, with a node_ranks that divides them",
        )
    nodes = [list(range(first, first + node_ranks)) for first in range(0, size, node_ranks)]
    places = [list(range(place, size, node_ranks)) for place in range(node_ranks)]
    return _own(nodes, group), _own(places, group)


def _own(lists: list[list[int]], everyone: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of the list that holds this rank."""
    if len(lists) == 1:
        return everyone
    own, _ = dist.new_subgroups_by_enumeration(lists)
    assert isinstance(own, dist.ProcessGroup)
    return own
