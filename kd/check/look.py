"""A look at a distillation before it starts: pairs, cost, and what is wrong with it or with its teacher."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.check.finding import Finding, stop
from kd.config import Config
from kd.hints import ConfigError, UserError

if TYPE_CHECKING:
    from kd.pairs import Cost, Pair

Say = Callable[[str], None]


@dataclasses.dataclass
class Look:
    """All that a check found."""

    student: Any = None
    teacher: Any = None  # the classifier as it teaches
    original: Any = None  # the same as it was saved
    trained: bool = True  # False: the teacher's own run is still to come, its weights are random here
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    cost: Cost | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    @property
    def starts(self) -> bool:
        """Whether the run would start."""
        return not any(f.stops for f in self.findings)


def look_at(cfg: Config, dataset: Any, where: str, say: Say, *, count: bool = True) -> Look:
    """Everything about the distillation that `cfg`, resolved, describes; what is wrong becomes a finding.

    With `count` one training step is made and counted. Raises ConfigError for settings at odds.
    """
    from kd import device, teacher
    from kd.check import diagnose

    look = Look()
    try:
        loaded, look.trained = present(cfg, dataset, say)
        teacher.check_classes(loaded.classifier, dataset, f"the teacher {cfg.teacher.name}")
    except ConfigError:
        raise
    except (UserError, ValueError, OSError) as error:
        look.findings.append(Finding("classes" if "classes" in str(error) else "teacher", str(error), ""))
        return look
    look.original = loaded.original
    half = device.resolve_precision(cfg.recipe.precision, where, loaded.classifier) == "bf16"
    look.teacher = loaded.classifier = teacher.freeze(loaded.classifier, where, half)
    look_at_pair(look, cfg, dataset, loaded, where if count else None)
    if look.trained:
        look.figures, findings = diagnose.once(loaded, dataset, cfg, where, half)
        look.findings += findings
    return look


def look_at_pair(look: Look, cfg: Config, dataset: Any, loaded: Any, where: str | None) -> None:
    """Student, pairs and, on a device, the cost; a loss that is undefined for the two networks is a finding."""
    from kd import pairs, prepare

    try:
        matched = prepare.match(cfg, dataset, look.teacher)
        look.student, look.pairs = matched.student, pairs.pairs(matched.loss, matched.outputs)
        if where:
            look.cost = pairs.cost(rehearse(cfg, dataset, loaded, where), look.teacher, dataset)
    except ConfigError:
        raise
    except (UserError, ValueError, OSError) as error:
        fix = "" if "Choose" in str(error) else "Type another loss=, or other networks"
        look.findings.append(Finding("pairs", str(error), fix))


def rehearse(cfg: Config, dataset: Any, loaded: Any, where: str) -> Any:
    """Everything that the first step needs, with a record that nobody keeps."""
    from kd import prepare, runs

    cfg = dataclasses.replace(cfg, teacher=dataclasses.replace(cfg.teacher, cache="off"))
    with tempfile.TemporaryDirectory() as folder:
        this = runs.Run(Path(folder))
        this.record["environment"] = {"device": where}
        return prepare.assemble(cfg, dataset, loaded, where, this, silent)


def silent(_: str) -> None:
    """Say nothing."""


class NotTrained(Exception):
    """The teacher is a run that has not been made yet."""


def find_run(config: Config, wait: bool = True) -> Any:
    """A teacher's finished run; NotTrained where there is none yet."""
    from kd import train

    run = train._run(dataclasses.replace(config, dry=True), say=silent)
    if not run.done:
        raise NotTrained(run.name)
    return run


def present(cfg: Config, dataset: Any, say: Say) -> tuple[Any, bool]:
    """(the teacher, whether it is trained): one that is still to be trained is built with random weights."""
    from kd import ensemble, models, teacher

    try:
        return teacher.obtain(cfg, dataset, find_run, say), True
    except NotTrained:
        pass
    if cfg.teacher.name == "ensemble":
        parts = [present(ensemble.member_config(cfg, m), dataset, say)[0] for m in cfg.teacher.members]
        together = ensemble.Ensemble([p.classifier for p in parts], cfg.teacher.average)
        return teacher.Loaded(together, {}, original=together, members=parts), False
    spec, sizes = dataclasses.asdict(cfg.teacher), (dataset.num_classes, dataset.image_size, dataset.channels)
    built = models.build(spec, *sizes, classes=dataset.classes).eval()
    return teacher.Loaded(built, {}, original=built), False


def before_teacher(cfg: Config, dataset: Any) -> None:
    """Where a teacher is still to be trained: is the loss defined for the pair at all, before hours go into it?

    Raises ValueError where it is not.
    """
    from kd import prepare, teacher

    if cfg.teacher.checkpoint != "auto":
        return
    if cfg.teacher.name != "ensemble":
        try:
            find_run(teacher.teacher_config(cfg))
            return
        except NotTrained:
            pass
    loaded, trained = present(cfg, dataset, silent)
    if not trained:
        prepare.match(cfg, dataset, loaded.classifier)


def short(cfg: Config, dataset: Any, where: str, say: Say) -> None:
    """A few lines on a run that is only shown (dry=true). Raises UserError where it would not start."""
    look = look_at(cfg, dataset, where, say, count=False)
    if look.pairs:
        say(f"pairs: {'; '.join(map(str, look.pairs))}")
    say(teacher_line(cfg, look.figures, look.trained))
    stop(look.findings, say)


def look_over(cells: Iterable[Any], say: Say = print) -> None:
    """The short check of a sweep's cells that are to be run, each combination once; fills in `cell.problem`."""
    from kd import device, prepare

    seen: dict[str, str | None] = {}
    for cell in cells:
        if cell.problem or not cell.pending or cell.config.teacher.name == "none":
            continue
        cfg = cell.config
        key = repr((cfg.teacher, cfg.student, cfg.loss, cell.dataset.digest))
        if key not in seen:
            seen[key] = None
            say(f"check: {cfg.teacher.name} -> {cfg.student.name}, {cell.label}")
            try:
                where = device.pick_device(cfg.device)
                short(prepare.resolve(cfg, cell.dataset), cell.dataset, where, lambda text: say(f"    {text}"))
            except (UserError, ValueError, OSError) as error:
                seen[key] = " ".join(str(error).split())
        cell.problem = seen[key]


def teacher_line(cfg: Config, figures: dict[str, float], trained: bool = True) -> str:
    """One line on a teacher's figures."""
    from kd.check.causes import percent

    if not trained:
        return f"teacher {cfg.teacher.name}: not trained yet, kd.train does that first and checks it then"
    split = next((n.split("/")[0] for n in figures if n.endswith("/nll")), None)
    if split is None:
        return f"teacher {cfg.teacher.name}: could not be scored"
    top1, nll, ece = (figures[f"{split}/{n}"] for n in ("top1", "nll", "ece"))
    text = f"teacher {cfg.teacher.name}: {split}/top1 {percent(top1)}, nll {nll:.3f}, ece {percent(ece)}"
    soft = {n.split("/", 1)[1]: v for n, v in figures.items() if n.startswith("entropy/") and n.count("/") == 2}
    return text + "".join(f", entropy at {name} {percent(v)} of the most" for name, v in soft.items())
