"""HiGHS as the certificate: prove a placement optimal within a gap, or find a better one.

Per layer, over the replicas that the spare slots allow (chosen beforehand: EPLB's even split makes
their shares constants): x[i,d] = 1 when replica i stands on device d, z = rows of the busiest
device. Minimise z subject to: every replica on one device, at most S replicas a device (memory),
at most one replica of an expert a device, all replicas of an expert within their node (topology,
where given), sum_i w_i x[i,d] <= z. This is MoETuner's balance stage (arXiv 2502.06643) with the
maximum instead of the sum of deviations, warm-started with the heuristic solution.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from mogul.core.errors import BackendError
from mogul.place.problem import Problem, device_load, lower_bound, replica_counts


@dataclass(frozen=True)
class Certificate:
    """What the solver can say about a layer."""

    slots_DS: np.ndarray
    bound: float
    """Rows: no solution with these replicas has a busiest device below."""

    seconds: float
    status: str

    def gap(self, problem: Problem) -> float:
        """Busiest device over the bound, minus 1."""
        return float(device_load(self.slots_DS, problem.load_E).max()) / self.bound - 1


def why_not() -> str | None:
    """None where HiGHS is installed, else what to do."""
    try:
        import highspy  # noqa: F401
    except ImportError:
        return "highspy is not installed (pip install 'mogul[place]')"
    return None


def certify(
    slots_DS: np.ndarray, problem: Problem, *, gap: float = 1e-3, limit_s: float = 10.0
) -> Certificate:
    """Prove `slots_DS` within `gap` of the best, or improve it; HiGHS runs only where needed.

    Raises:
        BackendError: HiGHS is not installed.
    """
    if reason := why_not():
        raise BackendError(f"method 'ilp' cannot run: {reason}", fix="pip install 'mogul[place]'")
    start_s = time.perf_counter()
    bound = lower_bound(problem)
    top = float(device_load(slots_DS, problem.load_E).max())
    if top <= bound * (1 + gap):
        return Certificate(slots_DS, bound, time.perf_counter() - start_s, "proven by the bound")
    found, solver_bound, status = _solve(slots_DS, problem, bound, gap, limit_s)
    if float(device_load(found, problem.load_E).max()) > top:
        found = slots_DS
    seconds = time.perf_counter() - start_s
    return Certificate(found, max(bound, solver_bound), seconds, status)


def _solve(
    slots_DS: np.ndarray, problem: Problem, bound: float, gap: float, limit_s: float
) -> tuple[np.ndarray, float, str]:
    import highspy

    replicas_E = replica_counts(slots_DS, problem.num_experts)
    expert_P = np.repeat(np.arange(problem.num_experts), replicas_E)
    share_P = (problem.load_E / replicas_E)[expert_P]
    scale = float(share_P.sum()) / problem.num_devices
    lp, start = _model(slots_DS, problem, expert_P, share_P / scale, bound / scale)
    solver: Any = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("time_limit", limit_s)
    solver.passModel(lp)
    solution: Any = highspy.HighsSolution()
    solution.col_value = start.tolist()
    solution.value_valid = True
    solver.setSolution(solution)
    solver.run()
    info = solver.getInfo()
    values = np.array(solver.getSolution().col_value)
    status = solver.modelStatusToString(solver.getModelStatus()).lower()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return slots_DS, max(info.mip_dual_bound, 0.0) * scale, status
    device_P = values[:-1].reshape(len(expert_P), problem.num_devices).argmax(axis=1)
    return _slots(expert_P, device_P, problem), max(info.mip_dual_bound, 0.0) * scale, status


def _model(
    slots_DS: np.ndarray,
    problem: Problem,
    expert_P: np.ndarray,
    share_P: np.ndarray,
    bound: float,
) -> tuple[Any, np.ndarray]:
    """The HiGHS model (columns x[i,d] row-major, then z) and the warm start."""
    import highspy

    num, devices = len(expert_P), problem.num_devices
    column_PD = np.arange(num * devices).reshape(num, devices)
    z = num * devices
    rows = _Rows()
    rows.add(column_PD, lower=1.0, upper=1.0)  # every replica on one device
    rows.add(column_PD.T, upper=float(problem.slots))
    rows.add(
        np.column_stack([column_PD.T, np.full(devices, z)]),
        np.tile(np.append(share_P, -1.0), (devices, 1)),
        upper=0.0,
    )
    for expert in np.flatnonzero(np.bincount(expert_P) > 1):
        rows.add(column_PD[expert_P == expert].T, upper=1.0)
    device_P = _devices_of(slots_DS, expert_P)
    start = np.zeros(z + 1)
    start[column_PD[np.arange(num), device_P]] = 1.0
    start[z] = np.bincount(device_P, weights=share_P, minlength=devices).max()
    lp: Any = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = z + 1, len(rows.length)
    lp.col_cost_ = np.append(np.zeros(z), 1.0)
    lp.col_lower_ = np.append(np.zeros(z), bound)
    lp.col_upper_ = np.append(_allowed(problem, slots_DS, expert_P).ravel(), np.inf)
    lp.row_lower_, lp.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kInteger] * z + [kinds.kContinuous]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.append(0, np.cumsum(rows.length)).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate(rows.index).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate(rows.value)
    return lp, start


class _Rows:
    """Constraints, row by row."""

    def __init__(self) -> None:
        self.index: list[np.ndarray] = []
        self.value: list[np.ndarray] = []
        self.length: list[int] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def add(
        self,
        columns: np.ndarray,
        values: np.ndarray | float = 1.0,
        *,
        lower: float = -np.inf,
        upper: float,
    ) -> None:
        """One constraint for each row of column numbers."""
        count, width = columns.shape
        self.index.append(columns.ravel())
        self.value.append(np.broadcast_to(np.asarray(values, np.float64), columns.shape).ravel())
        self.length += [width] * count
        self.lower += [lower] * count
        self.upper += [upper] * count


def _allowed(problem: Problem, slots_DS: np.ndarray, expert_P: np.ndarray) -> np.ndarray:
    """1 where a replica may stand [P, D]: on its expert's node, where nodes are given."""
    if problem.num_nodes == 1:
        return np.ones((len(expert_P), problem.num_devices))
    per_node = problem.num_devices // problem.num_nodes
    node_D = np.arange(problem.num_devices) // per_node
    node_E = np.empty(problem.num_experts, dtype=np.int64)
    for device, experts in enumerate(slots_DS):
        node_E[experts[experts >= 0]] = node_D[device]
    return (node_E[expert_P][:, None] == node_D[None, :]).astype(np.float64)


def _devices_of(slots_DS: np.ndarray, expert_P: np.ndarray) -> np.ndarray:
    """Device of every replica, in the order of `expert_P`."""
    device_of_slot = np.repeat(np.arange(len(slots_DS)), slots_DS.shape[1])
    flat = slots_DS.ravel()
    filled = flat >= 0
    order = np.argsort(flat[filled], kind="stable")
    assert (flat[filled][order] == expert_P).all()
    return device_of_slot[filled][order]


def _slots(expert_P: np.ndarray, device_P: np.ndarray, problem: Problem) -> np.ndarray:
    slots_DS = np.full((problem.num_devices, problem.slots), -1)
    for device in range(problem.num_devices):
        experts = expert_P[device_P == device]
        slots_DS[device, : len(experts)] = experts
    return slots_DS
