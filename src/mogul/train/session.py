"""Run a recipe: from its first step, or from its last checkpoint, to an exported model.

A run folder holds `recipe.json`, `metrics.jsonl`, `loads.jsonl`, `checkpoints/`, `trace/`,
`report.html` and, at the end, `model/`. Everything that decides the next step is in a checkpoint,
so a run that was killed goes on as if it had not been: on a CPU bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mogul.core.errors import ArtifactError, ConfigError, MogulError
from mogul.core.files import check_space
from mogul.core.log import ProgressBar, progress, say
from mogul.core.units import show_count
from mogul.observe.live import LiveTrace, live_numbers
from mogul.spec.families import model_spec
from mogul.spec.fingerprint import stamp_of_config
from mogul.train import state
from mogul.train.balance import SAMPLE_TOKENS, Balancer, has_experts
from mogul.train.build import around_forward, build_model, choose_device, chosen_kernels
from mogul.train.checkpoint import Saver, read_newest, steps_in
from mogul.train.data import Windows, held_out_windows, open_stream
from mogul.train.data.shards import TOKENIZER
from mogul.train.evaluate import held_out_loss
from mogul.train.export import export, has_tokenizer
from mogul.train.float8 import float8_products
from mogul.train.guard import SpikeGuard
from mogul.train.layers import prepared_layers
from mogul.train.loop import not_finite, refuse_mesh
from mogul.train.metrics import MetricsLog, Speedometer, note_of, peak_flop_per_s
from mogul.train.objective import choose_objective
from mogul.train.optimizer import build_optimizer
from mogul.train.recipe import Recipe
from mogul.train.recipe_file import RECIPE_FILE, read_resolved, write_resolved
from mogul.train.signals import StopFlag
from mogul.train.step import Gradients, Stepper

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CHECKPOINTS = "checkpoints"
MODEL = "model"
MOST_LOGITS = 1 << 28
"""In one forward of the held-out loss."""
MAY_CHANGE = ("checkpoint", "log")
"""Sections that may differ when a run is resumed, beside the length of the run."""


class Session:
    """One recipe in one folder; a context that holds the model dressed for training.

    Args:
        recipe: what to train, and how.
        folder: the run folder; made where it is missing.
        resume: go on from its newest whole checkpoint, if there is one.
        mesh: devices to train on; only one device is built today.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        *,
        resume: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        refuse_mesh(mesh)
        self.recipe, self.folder = recipe, Path(folder)
        self.num_steps = recipe.run.num_steps
        self._check_folder(resume)
        run = recipe.run
        self.device = choose_device(run.device)
        self.compiles = self.device.type != "cpu" if run.compile == "auto" else run.compile
        self.model = build_model(recipe, self.device)
        # Before any forward: a wrapper may swap parameters in the first one.
        self.optimizer = build_optimizer(
            self.model, recipe.optimizer, compile=self.device.type != "cpu"
        )
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._make_parts()
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        check_space(self.folder, 2 * weights)  # less than checkpoint and model: now, not then
        self.folder.mkdir(parents=True, exist_ok=True)
        write_resolved(recipe, self.folder)
        self.step, self.tokens = 0, 0
        self._stack = ExitStack()
        if resume:
            self._go_on()

    # ---- making ready

    def _make_parts(self) -> None:
        """Everything around model and optimizer."""
        recipe, run = self.recipe, self.recipe.run
        self.stream = open_stream(
            recipe.data,
            batch_size=run.batch_size,
            sequence_length=run.sequence_length,
            seed=run.seed,
        )
        self._check_vocabulary()
        self._check_length()
        self._check_tokenizer()
        self._held_out = self._held_out_windows()
        self.guard = SpikeGuard(run.spike_factor, run.spike_retries)
        self.balancer = self._balancer()
        self.saver = Saver(
            self.folder / CHECKPOINTS,
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
        )
        self._live = self._new_trace()

    def _check_folder(self, resume: bool) -> None:
        is_used = bool(steps_in(self.folder / CHECKPOINTS))
        if is_used and not resume:
            raise ConfigError(
                f"{self.folder} holds checkpoints of another run",
                fix="pass --resume to go on with it, or choose another folder",
            )
        if resume and (self.folder / RECIPE_FILE).exists():
            _check_same(read_resolved(self.folder), self.recipe)

    def _go_on(self) -> None:
        """Put back the newest whole checkpoint; begin where none was ever written."""
        root = self.folder / CHECKPOINTS
        if (snapshot := read_newest(root)) is not None:
            if snapshot.step > self.num_steps:
                raise ConfigError(
                    f"{root} has {snapshot.step} steps behind it, more than the {self.num_steps} "
                    "of the recipe",
                    fix="give run.steps (or run.tokens) at least as many",
                )
            state.put(self, snapshot)
            say(f"resumed at step {self.step} of {self.num_steps}")
        elif steps := steps_in(root):
            raise ArtifactError(
                f"none of the {len(steps)} checkpoints in {root} is whole",
                fix=f"to start anew, remove or rename {root}, or choose another folder",
            )

    def _check_vocabulary(self) -> None:
        config: Any = self.model.config
        if self.stream.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the data have ids up to {self.stream.vocab_size - 1}, the model a vocabulary of "
                f"{config.vocab_size}",
                fix=f"set vocab_size to {self.stream.vocab_size} or more",
            )

    def _check_length(self) -> None:
        length = self.recipe.run.sequence_length
        if length < 3 and getattr(self.model, "trains_mtp", False):
            raise ConfigError(
                f"sequences of {length} tokens have no token after next, which the model's "
                "further layer predicts",
                fix="set run.sequence_length to 3 or more, or num_nextn_predict_layers to 0",
            )

    def _check_tokenizer(self) -> None:
        named = self.recipe.model.tokenizer
        if named and not has_tokenizer(Path(named)):
            raise ConfigError(
                f"model.tokenizer: {named} holds no tokenizer",
                fix="name a folder with tokenizer.json, or leave it out",
            )

    def _balancer(self) -> Balancer | None:
        if not has_experts(self.model):
            return None
        run = self.recipe.run
        return Balancer(
            self.model,
            self.recipe.balance,
            micro_batches=run.accumulation,
            num_steps=self.num_steps,
            sample_tokens=min(SAMPLE_TOKENS, run.batch_size * run.sequence_length),
            compiled=self.compiles,
        )

    def _new_trace(self) -> LiveTrace | None:
        if self.balancer is None:
            return None
        config: Any = self.model.config
        stamp = stamp_of_config(config.to_dict(), name=self.folder.name)
        layers = tuple(one for one in self.balancer.layers if one < stamp.num_layers)
        return LiveTrace(stamp, layers, seed=self.recipe.run.seed)

    def __enter__(self) -> Self:
        recipe, run = self.recipe, self.recipe.run
        with ExitStack() as stack:  # undone where something below fails
            stack.enter_context(_deterministic(run.deterministic))
            stack.enter_context(float8_products(self.model, run.float8, self.device))
            stack.enter_context(
                prepared_layers(
                    self.model, compile=bool(self.compiles), recompute=run.activation_checkpointing
                )
            )
            stack.enter_context(self.balancer or nullcontext())
            stack.enter_context(chosen_kernels(run, self.device))
            self.stepper = Stepper(
                self.model,
                self.optimizer,
                choose_objective(self.model, run.loss, compile=bool(self.compiles)),
                max_grad_norm=recipe.optimizer.max_grad_norm,
                wide_sums=run.gradient_dtype == "float32",
                around=around_forward(run, self.device),
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stack.close()
        finally:
            self._end_writing(error)

    def _end_writing(self, earlier: BaseException | None) -> None:
        """Wait for the checkpoint under way; its error must not hide the one that ends the run."""
        try:
            self.saver.wait()
        except MogulError as error:
            if earlier is None:
                raise
            say(f"the last checkpoint was not written: {error}")

    # ---- steps

    def take_step(self) -> tuple[Gradients, bool]:
        """One optimizer step; the gradients (without tensors), and whether the step was taken.

        Raises:
            MogulError: Loss or gradient is no number and no spike guard is on.
        """
        if self.balancer is not None:
            self.balancer.begin_step(self.step)
        again = self.guard.due(self.step)
        batches, tries = again or (self._next_batches(), None)
        gradients = self.stepper.gradients(batches)
        is_taken = self.guard.accepts(gradients.loss, is_finite=gradients.is_finite)
        if is_taken:
            recipe = self.recipe
            factor = recipe.schedule.factor(self.step, self.num_steps)
            self.stepper.update(gradients, recipe.optimizer.lr * factor)
        elif not self.guard.is_on:
            raise not_finite(gradients, self.step)
        else:
            say(f"step {self.step} is skipped: loss {gradients.loss:.3f}")
            self.guard.skip(self.step, batches, tries)
            self.stepper.clear()
        if self.balancer is not None:
            self.balancer.end_step(updated=is_taken)
        self.step += 1
        self.tokens += self.recipe.run.tokens_per_step
        return Gradients(gradients.loss, gradients.norm, ()), is_taken

    def _next_batches(self) -> list[Tensor]:
        return [next(self.stream) for _ in range(self.recipe.run.accumulation)]

    # ---- looking

    def routing_numbers(self, log: MetricsLog) -> dict[str, float]:
        """Balance since the last look, and a line of loads; empty for a dense model."""
        if self.balancer is None or self._live is None:
            return {}
        counts, losses = self.balancer.take()
        sample = self.balancer.sample.cpu()
        self._live.add_sample(sample[: len(self._live.layers)])  # a trace ends before MTP
        log.write_loads(self.step, counts.tolist())
        grouping = self.balancer.shape.grouping
        return {**live_numbers(counts.numpy(), sample.long().numpy(), grouping).flat(), **losses}

    def evaluate(self) -> dict[str, float]:
        """Held-out loss; nothing where the data have no held-out part."""
        if self._held_out is None:
            return {}
        run, config = self.recipe.run, self.model.config
        vocabulary = getattr(config, "vocab_size", 1)
        rows = max(1, MOST_LOGITS // (run.sequence_length * vocabulary))
        with torch.compiler.set_stance("force_eager"), around_forward(run, self.device)():
            found = held_out_loss(self.model, self._held_out, batch_size=min(run.batch_size, rows))
        return {"held_out_loss": found.nats_per_token, "bits_per_byte": found.bits_per_byte}

    def _held_out_windows(self) -> Windows | None:
        run, log = self.recipe.run, self.recipe.log
        count = log.eval_batches * run.batch_size
        try:
            return held_out_windows(self.recipe.data, run.sequence_length, count=count)
        except ConfigError as error:
            say(f"no held-out loss: {error}")
            return None

    def write_trace(self) -> None:
        """The routing since the last trace, as the same record that `mogul trace` writes."""
        if self._live is not None:
            self._live.trace().save(self.folder / "trace")
            self._live = self._new_trace()

    def run(self) -> bool:
        """Train to the end; False when a signal stopped it before.

        Raises:
            MogulError: The loss is no number, or a checkpoint cannot be written.
        """
        log = MetricsLog(
            self.folder, resumed_step=self.step, tensorboard=self.recipe.log.tensorboard
        )
        with StopFlag() as stop, _closing(log):
            with progress("train", self.num_steps) as bar:
                self._train(stop, bar, log)
            is_done = self.step == self.num_steps  # a signal after the last step stops nothing
            self._finish(is_stopped=not is_done)
        return is_done

    def _train(self, stop: StopFlag, bar: ProgressBar, log: MetricsLog) -> None:
        """Take steps until the last or until a signal, telling, testing and saving on the way."""
        meter = Speedometer(
            model_spec(self.model.config.to_dict()),
            self.recipe.run.sequence_length,
            peak_flop_per_s(self.device),
        )
        losses: list[float] = []
        while self.step < self.num_steps and not stop.is_set:
            gradients, is_taken = self.take_step()
            if is_taken:
                losses.append(gradients.loss)
            meter.add(self.recipe.run.tokens_per_step)
            is_last = self.step == self.num_steps or stop.is_set
            is_told = self.step % self.recipe.log.every_steps == 0 or self._evaluates()
            if is_told or is_last:
                line = self._line(losses, gradients, meter, log)
                bar.update(self.step, note_of(line))
                losses.clear()
            if self._after_step(is_last):
                meter.start()

    def _line(
        self, losses: list[float], gradients: Gradients, meter: Speedometer, log: MetricsLog
    ) -> dict[str, Any]:
        schedule, evaluates = self.recipe.schedule, self._evaluates()
        speed = meter.take()
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": sum(losses) / len(losses) if losses else gradients.loss,
            "grad_norm": gradients.norm,
            "lr": self.recipe.optimizer.lr * schedule.factor(self.step - 1, self.num_steps),
            "skipped": self.guard.skipped,
            **speed,
            **{name: float(x) for name, x in getattr(self.stepper.objective, "parts", {}).items()},
            **self.routing_numbers(log),
            **(self.evaluate() if evaluates else {}),
        }
        if evaluates:
            self.write_trace()
        log.write(line)
        meter.start()
        return line

    def _evaluates(self) -> bool:
        every = self.recipe.log.eval_every_steps
        return self.step == self.num_steps or (every > 0 and self.step % every == 0)

    def _after_step(self, is_last: bool) -> bool:
        """Save where it is time; whether that took place."""
        self.saver.check()
        is_time = self.step % self.recipe.checkpoint.every_steps == 0
        if not (is_time or is_last):
            return False
        self.saver.save(state.take(self))
        return True

    def _finish(self, *, is_stopped: bool) -> None:
        if self.saver.last_step != self.step and self.step > 0:
            self.saver.save(state.take(self))
        self.saver.wait()
        if is_stopped:
            say(f"stopped at step {self.step} of {self.num_steps}; go on with --resume")
            return
        export(self.model, self.folder / MODEL, tokenizer=self._tokenizer())
        if self.recipe.log.report:
            self._report()
        say(f"trained {self.step} steps, {show_count(self.tokens)} tokens: {self.folder / MODEL}")

    def _report(self) -> None:
        """Write the page; where nothing can draw, say so: the training has succeeded."""
        from mogul.train.report import write_report

        try:
            write_report(self.folder)
        except ModuleNotFoundError as missing:
            say(f"no report.html: {missing}; pip install 'mogul[draw]', then --resume writes it")

    def _tokenizer(self) -> Path | None:
        """The folder of the tokenizer: named, or beside the tokens it made."""
        if self.recipe.model.tokenizer:
            return Path(self.recipe.model.tokenizer)
        beside = Path(self.recipe.data.sources[0].path) / TOKENIZER
        return beside if beside.is_dir() else None


def _check_same(before: Recipe, now: Recipe) -> None:
    """Refuse to resume with another recipe, naming what changed."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for values in (old, new):
        for section in MAY_CHANGE:
            values.pop(section)
        for key in ("steps", "tokens", "device"):
            values["run"].pop(key)
    changed = [
        f"{section}.{key}"
        for section in new
        for key in new[section]
        if new[section][key] != old[section].get(key)
    ]
    if changed:
        raise ConfigError(
            f"the run was started with another recipe; changed: {', '.join(changed)}",
            fix="resume with the old values (recipe.json), or start in another folder",
        )


@contextmanager
def _deterministic(is_on: bool) -> Iterator[None]:
    """Deterministic algorithms or not, for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def _closing(log: MetricsLog) -> Iterator[None]:
    try:
        yield
    finally:
        log.close()
