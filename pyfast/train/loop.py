"""The one training loop: batch, forward, backward, step, log; validate, save, stop, resume."""

import collections
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfast import models
from pyfast.train import checkpoint
from pyfast.train.config import TrainConfig
from pyfast.train.directory import open_run
from pyfast.train.interrupt import stop_requests
from pyfast.train.parameters import GradientSums, build_model, build_optimizer
from pyfast.train.progress import Metrics, Progress
from pyfast.train.schedule import learning_rate, steps_that_fit
from pyfast.train.task import LanguageModelling, Task

PROBE_STEPS = 10  # steps of a session that are timed before the first forecast


@dataclass(frozen=True)
class FitResult:
    """What a run came to. `history` holds the records of metrics.jsonl."""

    run_dir: Path
    step: int
    train_loss: float
    val_loss: float
    history: list[dict[str, Any]]


def fit(config: TrainConfig, task: Task | None = None) -> FitResult:
    """Train what `task` describes (by default a language model on `config.data`).

    The run directory gets `run.json`, `metrics.jsonl`, `checkpoint-<step>/` and, at the end, the
    model in Hugging Face layout and `report.html`. For a given thread count the losses are the same
    bits in every run, killed and resumed or not (unless `max_seconds` had to shorten one).

    Raises:
        ValueError, TypeError: the configuration, the data or the checkpoint cannot be used.
        RuntimeError: the loss is no longer finite, or a file cannot be written.
        KeyboardInterrupt: stopped by SIGINT or SIGTERM, after a checkpoint was saved.
    """
    from pyfast.train import report

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    task = task if task is not None else LanguageModelling(config)
    loop = _Loop(config, task)
    loop.run()
    with checkpoint.disk_errors(loop.run_dir):
        models.save(loop.model, loop.run_dir)
        report.write(loop.run_dir)
    return loop.result()


class _Loop:
    """The state of a run between two steps, and what one step does to it."""

    def __init__(self, config: TrainConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.model = build_model(config, task)
        self.optimizer = build_optimizer(self.model, config)
        self.run_dir, self.lock = open_run(config, task.name)
        self.step, self.total_steps, self.seconds = 0, config.run.steps, 0.0
        self.best_loss, self.best_step, self.bad_validations = math.inf, 0, 0
        self.saved_step = -1
        notes = self._restore() if config.run.resume else []
        task.save_extras(self.run_dir)
        self.metrics = Metrics(self.run_dir, self.saved_step)
        run = config.run
        self.progress = Progress(run.progress, self.step, self.total_steps, run.log_every)
        for note in notes:
            self.progress.note(note)
        self.step_seconds: collections.deque[float] = collections.deque(maxlen=50)
        self.val_seconds = 0.0

    def run(self) -> None:
        """Train to the end of the run, or until patience is exhausted."""
        self.progress.note(f"run directory: {self.run_dir}")
        try:
            with stop_requests() as stop:
                if self.step == 0:
                    self.metrics.append({"step": 0, **self._validate(), "seconds": self.seconds})
                    self.progress.step(self.metrics.records[-1], self.total_steps, None)
                while self.step < self.total_steps and not self._patience_exhausted():
                    self._advance()
                    if stop:
                        self._save()
                        where = f"step {self.step}; go on with --resume {self.run_dir}"
                        raise KeyboardInterrupt(f"train: stopped at {where}")
                self._finish()
        finally:
            self.progress.close()
            self.metrics.close()
            if self.lock is not None:
                self.lock.close()

    def result(self) -> FitResult:
        """The last training and validation loss (the best one, if patience chose it)."""
        records = self.metrics.records
        if self.config.run.patience is not None:
            records = [r for r in records if r["step"] <= self.best_step] or records
        last = {key: value for record in records for key, value in record.items()}
        return FitResult(
            run_dir=self.run_dir,
            step=last["step"],
            train_loss=last.get("train/loss", math.nan),
            val_loss=last.get("eval/loss", math.nan),
            history=self.metrics.records,
        )

    def _advance(self) -> None:
        """One optimizer step, with the validation, the record and the checkpoint that follow it."""
        run = self.config.run
        started = time.perf_counter()
        record = self._optimize()
        self.step += 1
        took = time.perf_counter() - started
        self.step_seconds.append(took)
        self.seconds += took
        record = {"step": self.step, **record, "seconds": round(self.seconds, 3)}
        record["train/tokens_per_sec"] = round(record.pop("tokens") / took, 1)
        due = self.step % run.val_every == 0 or self.step == self.total_steps
        improved = False
        if due:
            record |= self._validate()
            improved = self.best_step == self.step and run.patience is not None
            record["seconds"] = round(self.seconds, 3)
        shortened = self._shorten() if due or len(self.step_seconds) == PROBE_STEPS else False
        self.metrics.append(record)
        self.progress.step(record, self.total_steps, self._seconds_left())
        if self.step % run.save_every == 0 or improved or shortened:
            self._save()

    def _optimize(self) -> dict[str, float]:
        """One update from `accumulate` batches; the loss is the mean over all their terms."""
        optim = self.config.optim
        batches = [
            {name: t.to(self.config.run.device) for name, t in self.task.batch(index).items()}
            for index in range(self.step * optim.accumulate, (self.step + 1) * optim.accumulate)
        ]
        sums = GradientSums(self.model, len(batches))
        total, count = 0.0, 0
        for batch in batches:
            loss, terms = self.task.loss(self.model, batch)
            loss.backward()
            sums.collect()
            total, count = total + loss.item(), count + int(terms)
        sums.release()
        mean = total / max(count, 1)
        self._expect_finite("loss", mean, self.step + 1)
        rate = learning_rate(self.step, self.total_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.grad_scale = 1.0 / max(count, 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        norm = float(self.optimizer.grad_norm)
        self._expect_finite("gradient norm", norm, self.step + 1)
        tokens = sum(batch["tokens"].numel() for batch in batches)
        return {"train/loss": mean, "train/lr": rate, "train/grad_norm": norm, "tokens": tokens}

    def _validate(self) -> dict[str, float]:
        """The task's measures as "eval/..."; remembers the best loss and counts the others."""
        started = time.perf_counter()
        self.model.eval()
        with torch.no_grad():
            measures = self.task.validate(self.model)
        self.model.train()
        self.val_seconds = time.perf_counter() - started
        self.seconds += self.val_seconds
        self._expect_finite("validation loss", measures["loss"], self.step)
        if self.step and measures["loss"] < self.best_loss:  # step 0 is where it starts from
            self.best_loss, self.best_step, self.bad_validations = measures["loss"], self.step, 0
        elif self.step:
            self.bad_validations += 1
        return {f"eval/{name}": value for name, value in measures.items()}

    def _expect_finite(self, name: str, value: float, step: int) -> None:
        """RuntimeError that says where it happened and what can be done."""
        if not math.isfinite(value):
            path, _ = checkpoint.newest(self.run_dir)
            kept = f"{path.name} is from before" if path else "no checkpoint was saved before"
            raise RuntimeError(
                f"train: {name} must be finite; got {value} at step {step}; lower optim.lr ({kept})"
            )

    def _patience_exhausted(self) -> bool:
        patience = self.config.run.patience
        return patience is not None and self.bad_validations >= patience

    def _seconds_left(self) -> float:
        """Forecast for the steps left, validations included."""
        step = sum(self.step_seconds) / max(len(self.step_seconds), 1)
        return (self.total_steps - self.step) * (
            step + self.val_seconds / self.config.run.val_every
        )

    def _shorten(self) -> bool:
        """Lower the number of steps if they would not fit into `max_seconds`."""
        limit = self.config.run.max_seconds
        steps_left = self.total_steps - self.step
        if limit is None or steps_left <= 0:
            return False
        step_seconds = self._seconds_left() / steps_left
        total = steps_that_fit(self.step, self.total_steps, limit - self.seconds, step_seconds)
        shortened = total < self.total_steps
        if shortened:
            self.progress.note(
                f"{self.total_steps} steps do not fit in run.max_seconds={limit:g}: now {total}"
            )
        self.total_steps = total
        return shortened

    def _save(self) -> None:
        """Have a checkpoint of this step, and no more of the others than were asked for."""
        if self.saved_step != self.step:
            checkpoint.save(self.run_dir, self.step, self.model, self.optimizer, self._state())
            self.saved_step = self.step
        keep_step = self.best_step if self.config.run.patience is not None else None
        checkpoint.prune(self.run_dir, self.config.run.keep_last, keep_step)

    def _state(self) -> dict[str, Any]:
        return {
            "next_batch": self.step * self.config.optim.accumulate,
            "fingerprint": self.task.fingerprint,
            "steps": self.config.run.steps,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "bad_validations": self.bad_validations,
        }

    def _restore(self) -> list[str]:
        """Load the newest whole checkpoint, if there is one; returns what there is to say."""
        path, notes = checkpoint.newest(self.run_dir)
        if path is None:
            return ["no checkpoint yet: starting from the beginning"]
        state = checkpoint.load(path, self.model, self.optimizer)
        if state["fingerprint"] != self.task.fingerprint:
            raise ValueError(
                f"train: data must be what the run began with; got other contents in "
                f"{self.config.data.path}; start another run"
            )
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        if state["steps"] == self.config.run.steps:  # else the user has set another length
            self.total_steps = state["total_steps"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.best_step, self.bad_validations = state["best_step"], state["bad_validations"]
        return [*notes, f"resumed {self.run_dir} at step {self.step}"]

    def _finish(self) -> None:
        """The last checkpoint; with patience, back to the best model."""
        self._save()
        best = self.run_dir / f"checkpoint-{self.best_step}"
        if self.config.run.patience is not None and self.best_step != self.step and best.is_dir():
            checkpoint.load(best, self.model)
            self.progress.note(f"kept the model of step {self.best_step}, the best")
