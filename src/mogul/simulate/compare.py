"""Two models side by side: grouped against free routing, and experts against dense.

At equal load the steps are compared; at equal TPOT each model gets the largest batch that keeps
the target, and the throughputs are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from mogul.core.errors import ConfigError
from mogul.simulate.memory import most_sequences, serving_memory
from mogul.simulate.run import Prediction, Setting, price
from mogul.spec.model import ModelSpec
from mogul.spec.workload import Workload


@dataclass(frozen=True)
class Compared:
    """One model's point in a comparison."""

    name: str
    prediction: Prediction

    @property
    def rho(self) -> float:
        """Rows of the busiest rank over the mean."""
        loads = self.prediction.decode.loads
        return loads[0][1].rho if loads else 1.0

    @property
    def delta(self) -> float:
        """Distinct experts of the fullest rank over the mean."""
        loads = self.prediction.decode.loads
        return loads[0][1].delta if loads else 1.0


def with_groups(model: ModelSpec, num_groups: int) -> ModelSpec:
    """The same model routed in `num_groups` groups (1: free top-k).

    Raises:
        ConfigError: a dense model, or groups that do not divide experts and picks.
    """
    if model.moe is None:
        raise ConfigError(
            f"{model.family} has no experts to group", fix="name a model with experts"
        )
    grouping = model.moe.grouping.replace(num_groups=num_groups)
    return model.replace(moe=model.moe.replace(grouping=grouping))


def at_equal_tpot(setting: Setting, workload: Workload, tpot_s: float) -> Prediction:
    """The largest batch whose step is at most `tpot_s` and whose cache fits.

    Raises:
        ConfigError: not even one request a copy meets it.
    """
    steps = setting.step_model()
    setting.parallel.check(setting.model)
    copies = setting.parallel.dp
    most = most_sequences(
        setting.model, setting.parallel, setting.quant, workload, setting.device, setting.engine
    )

    def point(batch: int) -> Prediction:
        load = workload.replace(batch=batch * copies, prefill_batch=1)
        memory = serving_memory(
            setting.model, setting.parallel, setting.quant, load, setting.device, setting.engine
        )
        return price(steps, setting, load, memory)

    if most < 1:
        point(1).memory.check(f"{setting.title} on {setting.device.name}")
    if point(1).tpot_s > tpot_s:
        raise ConfigError(
            f"{setting.title} takes {1e3 * point(1).tpot_s:.1f} ms a token even alone: "
            f"{1e3 * tpot_s:g} ms cannot be met",
            fix="allow more time, or use more devices or fewer bits",
        )
    low, high = 1, max(1, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if point(middle).tpot_s <= tpot_s else (low, middle - 1)
    return point(low)
