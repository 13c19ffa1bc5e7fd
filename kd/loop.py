"""The epoch loop: batch -> view -> both outputs -> loss -> backward -> step, and now and then a look at val.

It has no branch on the method, the dataset or the architecture, and nothing in a step waits for the device: metrics stay
there and are read once an interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.checkpoint import Checkpoints
from kd.config import Recipe
from kd.contracts import Batch, Output
from kd.hints import Interrupted, UserError
from kd.optim import learning_rate, set_learning_rate

INTERVAL = 20  # steps between two readings of the metrics
CHECKPOINT_SHARE = 0.05  # of the time may go into checkpoints at epoch ends
CHECKPOINT_SECONDS = 300  # at most this much work between two checkpoints


class DivergedError(UserError):
    """The loss is not finite any more."""


class GaveUpError(UserError):
    """Whoever was asked at the end of an epoch saw no hope in going on; the checkpoint is written."""


@dataclass
class Progress:
    """Where a training stands: all that a resume needs beside tensors."""

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best validation so far
    stale: int = 0  # validations since then
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's metrics
    count: int = 0  # steps in `sums`
    seconds: float = 0.0  # spent training, over all sittings


@dataclass
class Training:
    """Everything that one fit works on."""

    student: nn.Module
    ask_teacher: Callable[[Batch, Batch], Output] | None  # (view, raw batch) -> the teacher's output
    loss: nn.Module
    view: Callable[..., Batch]
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    seed: int
    steps: int
    steps_per_epoch: int
    device: str
    autocast: bool
    cycle_epochs: int | None = None  # the order of the images repeats after so many, as the views do
    ema: nn.Module | None = None
    forward: Callable[..., Output] | None = None  # the student, compiled
    progress: Progress = field(default_factory=Progress)
    names: tuple[str, ...] = ()  # of the last step's metrics
    clock: float = field(default_factory=time.perf_counter)

    @property
    def kept(self) -> nn.Module:
        """The classifier that is evaluated and kept: the averaged one under EMA."""
        return self.ema.module if self.ema is not None else self.student

    def whole(self, step: int) -> bool:
        """Whether no gradients are waiting after so many steps: sums of `recipe.accumulate` batches end with the epoch."""
        inside = step % self.steps_per_epoch
        return inside % self.recipe.accumulate == 0 or step >= self.steps

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the kept classifier's weights."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict(),
            "progress": asdict(self.progress),
        }
        if self.ema is not None:
            state["raw"] = self.student.tensors()
            state["averaged"] = self.ema.n_averaged
        return state

    def close(self) -> dict[str, Any]:
        """Let go of what the teacher's cache holds; gives what the record says of it."""
        close = getattr(self.ask_teacher, "close", None)
        return close() if close else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state` gave and `Checkpoints.load_training` read."""
        self.student.load_tensors(state.get("raw", state["model"]))
        if self.ema is not None:
            self.ema.module.load_tensors(state["model"])
            self.ema.n_averaged.copy_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["loss"])
        self.progress = Progress(**state["progress"])


def train_step(training: Training, raw: Batch) -> Tensor:
    """One optimiser step's worth of forward and backward; the metrics of METRICS order, on the device, (M,)."""
    t, recipe = training, training.recipe
    torch.manual_seed((t.seed * 1_000_003 + t.progress.step) % 2**63)  # dropout and drop path: from (seed, step) alone
    batch = t.view(raw)
    if recipe.label_smoothing:
        batch.targets = smooth(batch.targets, t.student.num_classes, recipe.label_smoothing)
    with torch.autocast(torch.device(t.device).type, torch.bfloat16, enabled=t.autocast):
        teacher = t.ask_teacher(batch, raw) if t.ask_teacher is not None else None
        student = t.forward(batch.images, t.loss.student_features)
        if t.loss.views > 1:
            other = t.view(raw, stream=1)
            student.second = t.forward(other.images, t.loss.student_features)
            if teacher is not None:
                teacher.second = t.ask_teacher(other, raw)
    total, terms = t.loss(student, teacher, batch)
    (total / recipe.accumulate).backward()
    with torch.no_grad():
        guess = student.logits.argmax(1)
        right = (guess == (batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1))).float().mean()
        values = {"train/loss": total, **{f"train/loss/{n}": v for n, v in terms.items()}, "train/top1": right}
        if teacher is not None:
            values["train/agreement"] = (guess == teacher.logits.argmax(1)).float().mean()
        t.names = tuple(values)
        return torch.stack([v.detach().float() for v in values.values()])


def smooth(targets: Tensor, num_classes: int, amount: float) -> Tensor:
    """Soft labels (B, K): `amount` of each label spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    soft = F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets
    return soft * (1 - amount) + amount / num_classes


def apply_step(training: Training) -> float:
    """Clip, step and average, once `recipe.accumulate` batches are summed or the epoch is over; gives the learning rate."""
    t, recipe = training, training.recipe
    lr = learning_rate(recipe, t.progress.step, t.steps, t.steps_per_epoch)
    if not t.whole(t.progress.step + 1):
        return lr
    set_learning_rate(t.optimizer, lr)
    if recipe.clip_grad:
        parameters = [p for g in t.optimizer.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parameters, recipe.clip_grad, foreach=True)
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    if t.ema is not None:
        t.ema.update_parameters(t.student)
    return lr


class Meter:
    """Step metrics that stay on the device until `read`."""

    def __init__(self):
        self.rows: list[tuple[int, float, tuple[str, ...], Tensor]] = []

    def add(self, step: int, lr: float, names: tuple[str, ...], values: Tensor) -> None:
        """Keep a step's metrics without reading them."""
        self.rows.append((step, lr, names, values))

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """The metrics of every step since the last reading, in one transfer for each run of equal names."""
        read, rows = [], self.rows
        self.rows = []
        while rows:
            names = rows[0][2]
            size = next((i for i, r in enumerate(rows) if r[2] != names), len(rows))
            values = torch.stack([r[3] for r in rows[:size]]).tolist()
            read += [
                (r[0], {**dict(zip(names, v, strict=True)), "train/lr": r[1]})
                for r, v in zip(rows[:size], values, strict=True)
            ]
            rows = rows[size:]
        return read


def advance(training: Training, raw: Batch, meter: Meter, tracker: Any, console: Any) -> None:
    """One step: train, and once an interval read the metrics of the steps since the last reading."""
    values = train_step(training, raw)
    meter.add(training.progress.step, apply_step(training), training.names, values)
    training.progress.step += 1
    if len(meter.rows) >= INTERVAL:
        _flush(training, meter, tracker, console)


def timed_steps(training: Training, split: Any, count: int) -> list[float]:
    """Seconds of each of so many steps of the first epoch, again and again where it is shorter; the device is waited for."""
    times: list[float] = []
    while len(times) < count:
        for raw in split.epoch(0, training.recipe.batch_size, training.seed, device=training.device):
            started = time.perf_counter()
            train_step(training, raw).sum().item()
            apply_step(training)
            times.append(time.perf_counter() - started)
            if len(times) == count:
                break
    return times


def fit(
    training: Training,
    validate: Callable[[nn.Module], dict[str, float]] | None,
    split: Any,
    checkpoints: Checkpoints,
    tracker: Any,
    console: Any,
    stop: Any,
    give_up: Callable[[dict[str, float]], bool] = lambda _: False,
) -> Progress:
    """Train to the end or to the stop signal; leaves checkpoints `last` and `best`. Resumes from `training.progress`.

    Raises DivergedError when the loss is not finite (`best` is written all the same), Interrupted after a signal,
    GaveUpError when `give_up` says so of an epoch's metrics.
    """
    t, meter, saved = training, Meter(), _Saved()
    t.clock = time.perf_counter()
    with saved.best_of_a_diverged_run(checkpoints):
        while t.progress.step < t.steps and not _exhausted(t):
            epoch, offset = divmod(t.progress.step, t.steps_per_epoch)
            t.student.train()
            t.loss.train()
            for raw in split.epoch(epoch, t.recipe.batch_size, t.seed, offset, t.device, t.cycle_epochs):
                advance(t, raw, meter, tracker, console)
                if t.progress.step % t.steps_per_epoch == 0 or t.progress.step >= t.steps:
                    break  # a checkpoint here would be one of an epoch that has not been looked at
                if (stop.signum or saved.overdue()) and t.whole(t.progress.step):
                    _flush(t, meter, tracker, console)
                    saved.write(checkpoints, t, tracker)
                    _heed(stop, t)
            _flush(t, meter, tracker, console)
            row = _end_epoch(t, validate, checkpoints, tracker, console, saved)
            if stop.signum or saved.overdue():
                saved.write(checkpoints, t, tracker)
                _heed(stop, t)
            if give_up(row) and t.progress.step < t.steps:
                saved.write(checkpoints, t, tracker)
                raise GaveUpError(f"stopped early at epoch {row['epoch']:g} of {t.steps / t.steps_per_epoch:g}")
    saved.write(checkpoints, t, tracker)
    _heed(stop, t)
    return t.progress


def _heed(stop: Any, t: Training) -> None:
    """End a fit that a signal came for, once its checkpoint is written."""
    if stop.signum:
        where = f"step {t.progress.step} of {t.steps}"
        raise Interrupted(stop.signum, f"interrupted at {where}; the same command goes on from there")


def _exhausted(t: Training) -> bool:
    return bool(t.recipe.patience) and t.progress.stale >= t.recipe.patience


def _flush(t: Training, meter: Meter, tracker: Any, console: Any) -> None:
    """Read the interval's metrics, log them and stop at the first loss that is not finite."""
    rows = meter.read()
    if not rows:
        return
    seconds, t.clock = time.perf_counter() - t.clock, time.perf_counter()
    t.progress.seconds += seconds
    speed = {"images_per_s": len(rows) * t.recipe.batch_size / seconds, "time/step_ms": 1000 * seconds / len(rows)}
    for step, values in rows:
        if not math.isfinite(values["train/loss"]):
            shown = ", ".join(f"{n} {v:g}" for n, v in values.items() if n.startswith("train/loss"))
            raise DivergedError(
                f"diverged at step {step + 1} with learning rate {values['train/lr']:g} ({shown}). Lower recipe.lr, or set recipe.clip_grad=1"
            )
        tracker.log(values | speed if step == rows[-1][0] else values, step + 1)
        for name, value in values.items():
            t.progress.sums[name] = t.progress.sums.get(name, 0.0) + value
        t.progress.count += 1
    console.interval(t, values | speed)


def _end_epoch(
    t: Training, validate, checkpoints: Checkpoints, tracker: Any, console: Any, saved: _Saved
) -> dict[str, float]:
    """Validate, remember the best, keep what is to be kept, and save unless that would cost more than its share."""
    p, last = t.progress, t.progress.step >= t.steps
    epoch = math.ceil(p.step / t.steps_per_epoch)
    means = {f"{n}_epoch" if n == "train/lr" else n: v / max(1, p.count) for n, v in p.sums.items()}
    p.sums, p.count = {}, 0
    row = {"epoch": epoch, **{f"epoch/{n}": v for n, v in means.items() if not n.startswith("train/lr")}}
    if validate is not None and (epoch % t.recipe.val_every == 0 or last):
        found = validate(t.kept)
        row |= found
        p.stale += 1
        if _better(found, p.best):
            p.best, p.stale = {**found, "epoch": epoch, "step": p.step}, 0
            saved.remember(t.kept)
    tracker.log(row, p.step)
    console.epoch(t, row)
    if epoch in t.recipe.keep_epochs:
        checkpoints.save(f"epoch_{epoch:03d}", t.kept)
    if saved.worth_it() and not last:
        saved.write(checkpoints, t, tracker)
    t.clock = time.perf_counter()
    return row


def _better(found: dict[str, float], best: dict[str, float]) -> bool:
    """Higher val/top1; ties go to the lower val/nll. The split's name is whatever the validation gave."""
    if not best:
        return True
    split = next(n for n in found if n.endswith("/top1")).split("/")[0]
    now = (found[f"{split}/top1"], -found[f"{split}/nll"])
    return now > (best[f"{split}/top1"], -best[f"{split}/nll"])


class _Saved:
    """When the last checkpoint was written, what it cost, and a best classifier that is not on the disk yet."""

    def __init__(self):
        self.at, self.cost, self.waiting = time.perf_counter(), 0.0, None

    def seconds(self) -> float:
        return time.perf_counter() - self.at

    def overdue(self) -> bool:
        return self.seconds() > CHECKPOINT_SECONDS

    def worth_it(self) -> bool:
        return self.seconds() * CHECKPOINT_SHARE >= self.cost

    def write(self, checkpoints: Checkpoints, t: Training, tracker: Any) -> None:
        """Write `best` first, then the `last` that speaks of it; metrics up to here are on the disk before both."""
        started = time.perf_counter()
        tracker.flush()
        self.write_best(checkpoints)
        checkpoints.save("last", t.kept, t.state())
        self.at = time.perf_counter()
        self.cost = self.at - started

    def write_best(self, checkpoints: Checkpoints) -> None:
        """Write the best classifier where it is not on the disk yet."""
        if self.waiting is not None:
            checkpoints.save("best", self.waiting)
            self.waiting = None

    @contextmanager
    def best_of_a_diverged_run(self, checkpoints: Checkpoints) -> Iterator[None]:
        try:
            yield
        except DivergedError:
            self.write_best(checkpoints)
            raise

    def remember(self, classifier: nn.Module) -> None:
        import copy

        if self.waiting is None:
            self.waiting = copy.deepcopy(classifier)
        else:
            self.waiting.load_state_dict(classifier.state_dict())
