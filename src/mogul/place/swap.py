"""Swap experts between the busiest device and others until no swap lowers the busiest.

Three moves, cheapest first: one expert for one; two for two; a ring of one expert each over three
devices. A larger move is tried only where the smaller ones are stuck.
"""

from __future__ import annotations

import numpy as np

from mogul.place.problem import Problem, slot_load

_MAX_STEPS = 10_000
_RING_DEVICES = 32
"""A ring looks at this many of the least loaded devices."""

Cells = tuple[list[tuple[int, int]], list[tuple[int, int]]]
"""Slots (device, slot) and the slots whose experts they get."""


class _State:
    """A solution while it changes: experts, rows of slots and devices, who holds what."""

    def __init__(self, slots_DS: np.ndarray, problem: Problem) -> None:
        self.slots_DS = slots_DS.copy()
        self.load_DS = slot_load(slots_DS, problem.load_E)
        self.load_D = self.load_DS.sum(axis=1)
        self.has_replicas = (slots_DS >= 0).sum() > problem.num_experts
        self.held_ED = np.zeros((problem.num_experts, len(slots_DS)), dtype=bool)
        for device, experts in enumerate(slots_DS):
            self.held_ED[experts[experts >= 0], device] = True

    def move(self, cells: Cells) -> None:
        """Fill the first slots with what stands in the second ones, all at once."""
        to, source = cells
        experts = [self.slots_DS[cell] for cell in source]
        loads = [self.load_DS[cell] for cell in source]
        for cell in source:
            self.held_ED[self.slots_DS[cell], cell[0]] = False
        for cell, expert, load in zip(to, experts, loads, strict=True):
            self.slots_DS[cell], self.load_DS[cell] = expert, load
            if expert >= 0:
                self.held_ED[expert, cell[0]] = True
        for device in {cell[0] for cell in to}:
            self.load_D[device] = self.load_DS[device].sum()

    def may(self, cells: Cells) -> bool:
        """Whether a move keeps the replicas of every expert on different devices."""
        if not self.has_replicas:
            return True
        to, source = cells
        leaving = {(cell[0], int(self.slots_DS[cell])) for cell in source}
        arriving = [
            (cell[0], int(self.slots_DS[src])) for cell, src in zip(to, source, strict=True)
        ]
        return len(set(arriving)) == len(arriving) and all(
            expert < 0 or not self.held_ED[expert, device] or (device, expert) in leaving
            for device, expert in arriving
        )

    def clashes(self, device: int) -> np.ndarray:
        """Slots [D, S] whose expert already stands on `device`."""
        return self.held_ED[self.slots_DS, device] & (self.slots_DS >= 0)


def swap(slots_DS: np.ndarray, problem: Problem, *, target: float = 0.0) -> np.ndarray:
    """Improve a solution; never worse than it was given.

    Stops at `target` rows on the busiest device (a lower bound), or where no move helps. An empty
    slot takes part, so an expert may also move. Replicas of an expert never meet on one device.
    """
    state = _State(slots_DS, problem)
    for _ in range(_MAX_STEPS):
        busiest = int(state.load_D.argmax())
        if state.load_D[busiest] <= target:
            break
        found = (move(state, busiest) for move in _MOVES)
        cells = next((one for one in found if one and state.may(one)), None)
        if cells is None:
            break
        state.move(cells)
    return state.slots_DS


def _is_gain(after: float, top: float) -> bool:
    return after < top * (1 - 1e-12)


def _one_for_one(state: _State, busiest: int) -> Cells | None:
    top = state.load_D[busiest]
    less_SDS = state.load_DS[busiest][:, None, None] - state.load_DS[None]
    after_SDS = np.maximum(top - less_SDS, state.load_D[None, :, None] + less_SDS)
    after_SDS[:, busiest] = np.inf
    if state.has_replicas:
        mine_S = state.slots_DS[busiest]
        after_SDS[state.held_ED[mine_S] & (mine_S >= 0)[:, None]] = np.inf
        after_SDS[:, state.clashes(busiest)] = np.inf
    best = int(after_SDS.argmin())
    if not _is_gain(after_SDS.flat[best], top):
        return None
    mine, other, theirs = (int(i) for i in np.unravel_index(best, after_SDS.shape))
    here, there = (busiest, mine), (other, theirs)
    return [here, there], [there, here]


def _two_for_two(state: _State, busiest: int) -> Cells | None:
    top, slots = state.load_D[busiest], state.slots_DS.shape[1]
    if slots < 2:
        return None
    first, second = np.triu_indices(slots, 1)
    pair_DQ = state.load_DS[:, first] + state.load_DS[:, second]
    less_QDQ = pair_DQ[busiest][:, None, None] - pair_DQ[None]
    after_QDQ = np.maximum(top - less_QDQ, state.load_D[None, :, None] + less_QDQ)
    after_QDQ[:, busiest] = np.inf
    best = int(after_QDQ.argmin())
    if not _is_gain(after_QDQ.flat[best], top):
        return None
    mine, other, theirs = (int(i) for i in np.unravel_index(best, after_QDQ.shape))
    here = [(busiest, int(first[mine])), (busiest, int(second[mine]))]
    there = [(other, int(first[theirs])), (other, int(second[theirs]))]
    return here + there, there + here


def _ring(state: _State, busiest: int) -> Cells | None:
    """Busiest -> a -> b -> busiest, one expert each."""
    top, slots = state.load_D[busiest], state.slots_DS.shape[1]
    others = np.argsort(state.load_D, kind="stable")[:_RING_DEVICES]
    others = others[others != busiest]
    if len(others) < 2:
        return None
    cell_N = np.stack(np.meshgrid(others, np.arange(slots), indexing="ij"), -1).reshape(-1, 2)
    load_N, total_N = state.load_DS[cell_N[:, 0], cell_N[:, 1]], state.load_D[cell_N[:, 0]]
    best, found = top * (1 - 1e-12), None
    for mine in range(slots):
        given = state.load_DS[busiest, mine]
        after_NN = np.maximum(  # [a, b]: a gets `given`, b gets a's, busiest gets b's
            (total_N - load_N + given)[:, None], total_N[None] - load_N[None] + load_N[:, None]
        )
        np.maximum(after_NN, (top - given + load_N)[None], out=after_NN)
        after_NN[cell_N[:, 0][:, None] == cell_N[:, 0][None]] = np.inf
        spot = int(after_NN.argmin())
        if after_NN.flat[spot] < best:
            best, found = after_NN.flat[spot], (mine, *divmod(spot, len(cell_N)))
    if found is None:
        return None
    mine, a, b = found
    cells = [(busiest, mine), tuple(cell_N[a].tolist()), tuple(cell_N[b].tolist())]
    return [cells[1], cells[2], cells[0]], cells


_MOVES = (_one_for_one, _two_for_two, _ring)
