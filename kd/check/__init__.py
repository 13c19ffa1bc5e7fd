"""Look at a teacher, a student and a loss before anything is spent: stages, pairs, cost, and the teacher's health.

python -m kd.check teacher=resnet56_a teacher.checkpoint=PATH student=resnet8 loss=fitnet
python -m kd.check teacher=vit_b student=resnet18 plot=true     also draw how alike their stages are
python -m kd.check ... out=FILE.json                            also write the figures
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import cli
from kd.check.finding import stop
from kd.check.look import Look, before_teacher, look_at, short, teacher_line
from kd.config import CheckConfig, Config
from kd.contracts import STAGES
from kd.hints import ConfigError, UserError

if TYPE_CHECKING:
    from kd.pairs import Cost

PLOT_IMAGES = 256


def main() -> None:
    """`python -m kd.check` and `kd-check`."""
    cli.entry("check", check, __doc__)


def check(cfg: CheckConfig) -> dict[str, Any]:
    """The report on the screen and as plain data (in `out` too). Raises UserError where the run would not start."""
    from kd import device, files, prepare

    if cfg.teacher.name == "none":
        raise ConfigError("there is nothing to check with teacher=none: type teacher=NAME student=NAME loss=NAME")
    where = device.pick_device(cfg.device)
    device.set_up(where, cfg.threads)
    plain = Config(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config)})  # as kd.train has it
    dataset = prepare.open_dataset(plain)
    look = look_at(prepare.resolve(plain, dataset), dataset, where, print)
    show(look, cfg)
    if cfg.plot:
        print(f"stages compared: {draw(look, dataset, cfg)}")
    facts = as_dict(look)
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(cfg.out), facts)
    if not look.starts:
        print("the run would not start:", flush=True)
    stop(look.findings, print)
    return facts


def show(look: Look, cfg: Config) -> None:
    """The report as a table and lines on the screen."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if look.original is not None:
        console.print(stage_table(look))
    for pair in look.pairs:
        console.print(f"pair: {pair}")
        for name, count in pair.modules.items():
            console.print(f"      {name}: {count:,} parameters, trained with the student and no part of it")
    if look.cost is not None:
        console.print(cost_line(look.cost, cfg.recipe.batch_size))
    if look.original is not None:
        console.print(teacher_line(cfg, look.figures, look.trained))
    if look.figures:
        console.print(f"      {paths_line(look.figures)}")
    if not look.findings:
        console.print("nothing is wrong")


def paths_line(figures: dict[str, float]) -> str:
    """The teacher by itself and as it teaches."""
    from kd.check.causes import percent

    return (
        f"by itself {percent(figures['own/top1'])}, through the path it teaches by {percent(figures['path/top1'])} on "
        f"the same images; entropy at temperature 1 {percent(figures['entropy/1'])} of the most; in eval mode, no gradients"
    )


def stage_table(look: Look) -> Any:
    """The networks' stages with their shapes, one network a column."""
    from rich.table import Table

    table, networks = Table(), [*members("teacher", look.original), *members("student", look.student)]
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
    parts = list(getattr(model, "members", [model]))
    return [(f"{role} {m.name}" + (f" ({i})" if len(parts) > 1 else ""), m) for i, m in enumerate(parts, start=1)]


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
    weights = [m for m in classifier.head.modules() if hasattr(m, "in_features") or hasattr(m, "in_channels")]
    return str(getattr(weights[0], "in_features", None) or weights[0].in_channels) if weights else "there"


def cost_line(cost: Cost, batch_size: int) -> str:
    """What one step costs."""
    return (
        f"cost: {_count(cost.step)} MACs an image and step (student {_count(cost.student)} forward, teacher "
        f"{_count(cost.teacher)}); memory about {cost.memory_mib:,.0f} MiB at batch size {batch_size} "
        f"({cost.activations_mib:,.0f} activations, {cost.states_mib:,.0f} weights, gradients and optimiser)"
    )


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def draw(look: Look, dataset: Any, cfg: CheckConfig) -> Path:
    """The CKA map of the student's and the teacher's stages on some images of the dataset."""
    from kd.check import cka, suspects

    if look.student is None or hasattr(look.teacher, "members"):
        raise UserError("plot=true needs one teacher, and a student that can be built: leave it out here")
    split = dataset.val if dataset.val is not None and len(dataset.val) else dataset.train
    images = suspects.spread(split, PLOT_IMAGES).images
    known = {"teacher": look.trained, "student": bool(cfg.student.checkpoint)}
    labels = [f"{role}: {m.name}{'' if known[role] else ', untrained'}" for role, m in
              (("teacher", look.teacher), ("student", look.student))]  # fmt: skip
    folder = Path(cfg.out).parent if cfg.out else Path(cfg.runs_dir) / "check"
    path = folder / f"cka-{cfg.dataset.name}-{cfg.teacher.name}-{cfg.student.name}.png"
    title = f"{len(images)} images of {cfg.dataset.name}"
    return cka.draw(cka.compare(look.student, look.teacher, images), path, title=title, labels=labels)


def as_dict(look: Look) -> dict[str, Any]:
    """The report as plain data."""
    networks = [*members("teacher", look.original), *members("student", look.student)]
    return {
        "starts": look.starts,
        "trained": look.trained,
        "findings": [dataclasses.asdict(f) for f in look.findings],
        "stages": {name: part.stages() for name, part in networks},
        "pairs": [{**dataclasses.asdict(p), "parameters": p.parameters} for p in look.pairs],
        "cost": dataclasses.asdict(look.cost) | {"memory_mib": look.cost.memory_mib} if look.cost else None,
        "teacher": look.figures,
    }


__all__ = ["before_teacher", "check", "main", "short", "teacher_line"]
