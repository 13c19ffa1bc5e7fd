"""Look at a teacher, a student and a loss before anything is spent: stages, pairs, cost, and whether the teacher can teach.

python -m kd.check teacher=resnet56_a teacher.checkpoint=PATH student=resnet8 loss=fitnet dataset=folder dataset.root=PATH
python -m kd.check teacher=vit_b student=resnet18 plot=true     also draw how alike their stages are
python -m kd.check ... out=FILE.json                            also write the figures
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli
from kd.config import CheckConfig, Config
from kd.contracts import STAGES
from kd.finding import Finding
from kd.hints import ConfigError, UserError

if TYPE_CHECKING:
    from kd.pairs import Cost, Pair

PLOT_IMAGES = 256


def main() -> None:
    """`python -m kd.check` and `kd-check`."""
    cli.entry("check", check, __doc__)


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


def check(cfg: CheckConfig) -> dict[str, Any]:
    """The report on the screen and as a dict (in `out` too). Raises UserError where the run would not start."""
    from kd import device, files, prepare

    if cfg.teacher.name == "none":
        raise ConfigError("there is nothing to check with teacher=none: type teacher=NAME student=NAME loss=NAME")
    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    dataset = prepare.open_dataset(cfg)
    plain = Config(
        **{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config)}
    )  # what train would have: names runs
    look = look_at(prepare.resolve(plain, dataset), dataset, where, print)
    show(look, cfg)
    if cfg.plot:
        print(f"stages compared: {draw(look, dataset, cfg, where)}")
    facts = as_dict(look)
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(cfg.out), facts)
    conclude(look)
    return facts


def look_at(cfg: Config, dataset: Any, where: str, say: Callable[[str], None], count: bool = True) -> Look:
    """Everything but the picture; what is wrong becomes a finding. With `count` one step is made and counted."""
    from kd import device, diagnose, teacher

    look = Look()
    half = device.resolve_precision(cfg.recipe.precision, where) == "bf16"
    try:
        loaded, look.trained = present(cfg, dataset, say)
        teacher.check_classes(loaded.classifier, dataset, f"the teacher {cfg.teacher.name}")
    except ConfigError:
        raise
    except (UserError, ValueError, OSError) as error:
        look.findings.append(Finding("classes" if "classes" in str(error) else "teacher", str(error).rstrip("."), ""))
        return look
    look.original = loaded.original
    look.teacher = loaded.classifier = teacher.freeze(loaded.classifier, where, half)
    look_at_pair(look, cfg, dataset, loaded, where, count)
    if look.trained:
        look.figures, findings = diagnose.diagnose(loaded, dataset, cfg, where, half)
        look.findings += findings
    return look


def look_at_pair(look: Look, cfg: Config, dataset: Any, loaded: Any, where: str, count: bool) -> None:
    """Student, pairs and cost; a loss that is undefined for the two networks is a finding."""
    from kd import pairs, prepare, runs, train

    try:
        matched = prepare.match(cfg, dataset, look.teacher)
        look.student, look.pairs = matched.student, pairs.pairs(matched.loss, matched.outputs)
        if count:
            with tempfile.TemporaryDirectory() as folder:
                this = runs.Run(Path(folder))  # a record that nobody keeps
                this.record["environment"] = {"device": where}
                training = prepare.assemble(cfg, dataset, loaded, where, this, train._silent)
            look.cost = pairs.cost(training, look.teacher, dataset)
    except (UserError, ValueError) as error:
        look.findings.append(
            Finding("pairs", str(error).rstrip("."), "Type another loss=, student= or stages for this term")
        )


class NotTrained(Exception):
    """The teacher is a run that has not been made yet."""


def present(cfg: Config, dataset: Any, say: Callable[[str], None]) -> tuple[Any, bool]:
    """(the teacher, whether it is trained): one whose run is still to come is built with random weights, for its shapes."""
    from kd import ensemble, models, teacher, train

    def find(config: Config, wait: bool = True) -> Any:
        run = train._run(dataclasses.replace(config, dry=True), say=train._silent)
        if not run.done:
            raise NotTrained(run.name)
        return run

    try:
        return teacher.obtain(cfg, dataset, find, say), True
    except NotTrained:
        pass
    if cfg.teacher.name == "ensemble":
        parts = [present(ensemble.member_config(cfg, m), dataset, say)[0] for m in cfg.teacher.members]
        together = ensemble.Ensemble([p.classifier for p in parts], cfg.teacher.average)
        return teacher.Loaded(together, {}, original=together, members=parts), False
    spec = dataclasses.asdict(cfg.teacher)
    built = models.build(
        spec, dataset.num_classes, dataset.image_size, dataset.channels, classes=dataset.classes
    ).eval()
    return teacher.Loaded(built, {}, original=built), False


def before_teacher(cfg: Config, dataset: Any) -> None:
    """Where a teacher is still to be trained: whether the loss is defined for the pair at all, before hours go into it."""
    from kd import prepare, train

    if cfg.teacher.checkpoint == "auto":
        loaded, trained = present(cfg, dataset, train._silent)
        if not trained:
            prepare.match(cfg, dataset, loaded.classifier)


def short(cfg: Config, dataset: Any, where: str, say: Callable[[str], None]) -> None:
    """A few lines on a run that is only shown (dry=true). Raises UserError where it would not start."""
    look = look_at(cfg, dataset, where, say, count=False)
    if look.pairs:
        say(f"pairs: {'; '.join(map(str, look.pairs))}")
    say(
        teacher_line(cfg, look.figures)
        if look.trained
        else f"teacher {cfg.teacher.name}: not trained yet, that comes first"
    )
    conclude(look)


def teacher_line(cfg: Config, figures: dict[str, float]) -> str:
    """One line on a teacher's figures."""
    if not figures:
        return f"teacher {cfg.teacher.name}: could not be scored"
    split = next(n for n in figures if n.endswith("/top1") and n.split("/")[0] in ("val", "train")).split("/")[0]
    text = f"teacher {cfg.teacher.name}: {split}/top1 {_percent(figures[f'{split}/top1'])}, nll {figures[f'{split}/nll']:.3f}, "
    text += f"ece {_percent(figures[f'{split}/ece'])}"
    soft = [
        f"{n.removeprefix('entropy/')} {_percent(v)}"
        for n, v in figures.items()
        if n.startswith("entropy/") and n.count("/") == 2
    ]
    return text + (f", entropy of the most at {', '.join(soft)}" if soft else "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def conclude(look: Look) -> None:
    """Raise UserError naming what keeps the run from starting; say the rest."""
    from kd import finding

    stopping = [f for f in look.findings if f.stops]
    if stopping:
        print(f"the run would not start: {len(stopping)} finding{'s' if len(stopping) > 1 else ''}", flush=True)
    finding.stop(look.findings, print)


def show(look: Look, cfg: Config) -> None:
    """The report as tables on the screen."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if look.teacher is not None:
        console.print(stage_table(look))
    for pair in look.pairs:
        console.print(f"pair: {pair}")
        for name, count in pair.modules.items():
            console.print(f"      {name}: {count:,} parameters, trained with the student and no part of it")
    if look.cost is not None:
        console.print(cost_line(look.cost, cfg.recipe.batch_size))
    if not look.trained:
        console.print(
            f"teacher {cfg.teacher.name}: not trained yet. kd.train does that first; its quality is checked then"
        )
    elif look.figures:
        console.print(teacher_line(cfg, look.figures))
        own = look.figures
        console.print(
            f"      by itself {_percent(own['own/top1'])}, through the distillation path {_percent(own['path/top1'])} on the same images; "
            f"entropy at temperature 1 {_percent(own['entropy/1'])} of the most; in eval mode, without gradients"
        )
    if not look.findings:
        console.print("nothing is wrong")


def stage_table(look: Look) -> Any:
    """The networks' stages with their shapes, one network a column."""
    from rich.table import Table

    table, networks = Table(), members("teacher", look.original) + members("student", look.student)
    for column in ("", *(name for name, _ in networks)):
        table.add_column(column, justify="right" if column else "left")
    columns = [stage_column(part) for _, part in networks]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


def members(role: str, model: Any) -> list[tuple[str, Any]]:
    """A network, or the networks of an ensemble, by what to call them."""
    if model is None:
        return []
    return [(f"{role} {m.name}", m) for m in getattr(model, "members", [model])]


def stage_column(classifier: Any) -> dict[str, str]:
    """Parameters, shapes of the stages and the width of the penultimate vector."""
    from kd.models import count_parameters
    from kd.pairs import shown

    stages = classifier.stages()
    shapes = {s: shown(stages[s]["shape"]) if s in stages else "none" for s in STAGES}
    return {"parameters": f"{count_parameters(classifier):,}", **shapes, "penultimate": width(classifier)}


def width(classifier: Any) -> str:
    """Of the penultimate vector, or `none`."""
    if classifier.head is None:
        return "none"
    weights = [
        m for m in classifier.head.modules() if getattr(m, "in_features", None) or getattr(m, "in_channels", None)
    ]
    return str(getattr(weights[0], "in_features", None) or weights[0].in_channels) if weights else "there"


def cost_line(cost: Cost, batch_size: int) -> str:
    """What one step costs."""
    return (
        f"cost: {_count(cost.step)} MACs an image and step (student {_count(cost.student)} forward, teacher {_count(cost.teacher)}); "
        f"memory about {cost.memory_mib:,.0f} MiB at batch size {batch_size} "
        f"({cost.activations_mib:,.0f} activations, {cost.states_mib:,.0f} weights, gradients and optimiser)"
    )


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def draw(look: Look, dataset: Any, cfg: CheckConfig, where: str) -> Path:
    """The CKA map of the student's and the teacher's stages on some images of the dataset."""
    from kd import cka, suspects

    if look.student is None or hasattr(look.teacher, "members"):
        raise UserError("plot=true needs one teacher and a student whose loss can be set up: leave it out here")
    split = dataset.val if dataset.val is not None and len(dataset.val) else dataset.train
    images = suspects.spread(split, PLOT_IMAGES).images
    names = [f"{m.name}{'' if known else ' (untrained)'}" for m, known in
             ((look.teacher, look.trained), (look.student, bool(cfg.student.checkpoint or cfg.student.pretrained)))]  # fmt: skip
    folder = Path(cfg.out).parent if cfg.out else Path(cfg.runs_dir) / "check"
    path = folder / f"cka-{cfg.dataset.name}-{cfg.teacher.name}-{cfg.student.name}.png"
    found = cka.compare(look.student, look.teacher, images)
    return cka.draw(found, path, f"{names[0]} and {names[1]}, {len(images)} images of {cfg.dataset.name}")


def as_dict(look: Look) -> dict[str, Any]:
    """The report as plain data."""
    models = {"teacher": look.original, "student": look.student}
    return {
        "starts": not any(f.stops for f in look.findings),
        "trained": look.trained,
        "findings": [dataclasses.asdict(f) for f in look.findings],
        "stages": {name: part.stages() for role, model in models.items() for name, part in members(role, model)},
        "pairs": [{**dataclasses.asdict(p), "parameters": p.parameters} for p in look.pairs],
        "cost": dataclasses.asdict(look.cost) | {"memory_mib": look.cost.memory_mib} if look.cost else None,
        "teacher": look.figures,
    }


if __name__ == "__main__":
    main()
