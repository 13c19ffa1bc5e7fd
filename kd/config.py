"""The schema of every setting, and composing the YAML groups of conf/ into one typed configuration.

Nothing here imports torch: `python -m kd.train --help` must answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from kd.hints import ConfigError, did_you_mean

ROLES = ("teacher", "student")
GROUPS = (*ROLES, "dataset", "loss", "augment", "recipe", "tracker", "experiment", "sweep", "search")
FREE = re.compile(
    r"(student\.args|teacher\.args|dataset\.args|(teacher\.)?recipe\.optimizer_args|loss\.[^.=]+)\.[^=]+="
)
LENGTHS = ("epochs", "steps", "minutes")


@dataclass
class Preprocess:
    """What turns an image into a network's input; what is null comes from the model's own data config."""

    mean: list[float] | None = None
    std: list[float] | None = None
    size: int | None = None  # pixels; null: the dataset's
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass
class Model:
    """A network: `name` as timm spells it, or a class of ours in `args._target_`; the rest of `args` is its arguments."""

    name: str = MISSING
    family: str = "other"
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: Any = "auto"  # auto: hub weights at 96 pixels and above
    checkpoint: str | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)


@dataclass
class Augment:
    """What the view of an image goes through."""

    crop_padding: float = 0.0  # as a fraction of the image's side
    random_resized_crop: list[float] | None = None  # smallest and largest area
    flip: bool = False  # applied where a mirrored image keeps its class: dataset.mirror
    color_jitter: float = 0.0
    randaugment: str | None = None  # such as m9-n2
    trivial: bool = False
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cycle_epochs: int | None = None
    teacher_view: str = "same"  # same | independent | clean


@dataclass
class Recipe:
    """How a network is trained: exactly one of `epochs`, `steps`, `minutes` is its length."""

    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    optimizer: str = "adamw"  # any of timm's names
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.05
    decay_all: bool = False  # also biases and norms, as the CIFAR literature does
    schedule: str = "cosine"  # cosine | multistep | constant
    warmup: float = 0.1  # fraction of the whole length
    milestones: list[float] = field(default_factory=list)  # epochs at which multistep multiplies lr by `decay`
    decay: float = 0.1
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    accumulate: int = 1
    ema: float | None = None  # decay of the averaged weights, which are then the ones evaluated and kept
    patience: int | None = None  # validations without a better val/top1 before training stops
    val_every: int = 1  # epochs
    keep_epochs: list[int] = field(default_factory=list)
    precision: str = "auto"  # auto | fp32 | bf16
    compile: str = "auto"  # auto | on | off


@dataclass
class Student(Model):
    """The network that is trained."""


@dataclass
class Teacher(Model):
    """The network that is imitated. A teacher is a run of its own: recipe, seed and data do not follow the student's."""

    checkpoint: str | None = (
        "auto"  # auto: the run that its recipe describes, trained if need be; hub; or a path or artifact
    )
    epoch: int | None = None  # a checkpoint that teacher.recipe.keep_epochs kept
    seed: int = 0
    train_fraction: float = 1.0
    min_top1: float | None = None  # null: twice chance
    cache: str = "auto"  # auto | on | off: keep what the teacher says of each view, for the runs after this one
    cache_gib: float = 16.0  # all caches of a runs_dir together
    members: list[str] = field(default_factory=list)  # of an ensemble: presets or checkpoints
    average: str = "probs"  # of an ensemble: probs | logits
    classes: list[str] = field(
        default_factory=list
    )  # what its outputs mean, in their order, where that is not the dataset's
    recipe: Recipe = field(default_factory=Recipe)
    augment: Augment = field(default_factory=Augment)


@dataclass
class Dataset:
    """Where images and labels come from. `_target_` is a function that lists them."""

    name: str = MISSING
    _target_: str = MISSING
    root: str | None = None
    image_size: Any = "auto"
    train_fraction: float = 1.0
    val_fraction: float = 0.1
    test_fraction: float = 0.2  # where the source has no test split of its own
    split_seed: int = 0
    memory_gib: float = 8.0
    on_error: str = "raise"  # raise | skip
    mirror: bool = True  # a mirrored image keeps its class
    select: str = "val"  # the split that chooses the best epoch; test only to compare with published tables
    download: bool = True
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tracker:
    """Where metrics go besides metrics.jsonl."""

    name: str = "wandb"  # wandb | none
    project: str = "kd"
    entity: str | None = None
    mode: str = "auto"  # auto: online with a key, else offline
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    """One run."""

    seed: int = 0
    runs_dir: str = "runs"
    fresh: bool = False
    dry: bool = False
    device: str = "auto"
    threads: int | None = None
    workers: int = 2
    baseline: str = "train"  # the student alone, to compare with: train | find | off
    objective: Any = "val/top1"  # what a search looks at: one metric, or a list of two
    give_up: str = "off"  # off | median: end a search's trial that is worse than half of the finished ones
    sweep_name: str | None = None
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    dataset: Dataset = field(default_factory=Dataset)
    loss: dict[str, Any] = field(default_factory=dict)
    augment: Augment = field(default_factory=Augment)
    recipe: Recipe = field(default_factory=Recipe)
    tracker: Tracker = field(default_factory=Tracker)


@dataclass
class EvaluateConfig(Config):
    """A run, or a teacher and a dataset, to be scored."""

    run: str | None = None
    out: str | None = None
    split: str = "test"
    trust: bool = False  # load classes outside kd that a model's config.json names


@dataclass
class CheckConfig(Config):
    """A teacher, a student and a loss, to be looked at before anything is spent."""

    out: str | None = None  # a JSON file for the figures
    plot: bool = False  # draw how alike the stages are (CKA)


@dataclass
class ExportConfig(EvaluateConfig):
    """A run, to be written as one file that runs without kd."""

    format: str = "onnx"  # onnx | torch_export | executorch
    quantize: str | None = None  # int8
    calibration: int = 256  # training images that set the ranges of int8
    tolerance: float = 1e-4  # largest difference of a float32 file's logits
    max_drop: float = 0.02  # largest loss of top-1, as a fraction


@dataclass
class BenchmarkConfig(EvaluateConfig):
    """One or more runs, or a teacher and a student, to be measured side by side."""

    step: bool = False  # where a training step's time goes, instead
    run: Any = None  # one, or [several]
    modes: list[str] = field(default_factory=lambda: ["eager"])  # eager | compiled | onnx | torch_export | executorch
    precisions: list[str] = field(default_factory=lambda: ["fp32"])  # fp32 | bf16 | int8
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 64, 256])
    seconds: float = 2.0  # for each model, mode, precision and batch size, at least
    interval: float = (
        0.03  # goes on, up to five times as long, until the 95 % intervals are this narrow (relative half-width)
    )
    memory: bool = True
    calibration: int = 256


@dataclass
class CellSweeper:
    """hydra/sweeper=cells: every cell, a set of overrides, times every combination of the parameters. See kd/sweep/."""

    _target_: str = "hydra_plugins.kd.CellSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)


def conf_dir() -> Path:
    """The folder of YAML groups: kd/conf in an installed wheel, conf/ beside kd/ in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


@functools.cache
def store_schemas() -> None:
    """The typed nodes that the YAML files are checked against, once in a process."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="check_schema", node=CheckConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="benchmark_schema", node=BenchmarkConfig)
    store.store(group="hydra/sweeper", name="cells", node=CellSweeper)


def register(config_dirs: Iterable[Path] = ()) -> None:
    """Store the schemas, and offer every model/NAME.yaml as teacher=NAME and student=NAME."""
    store_schemas()
    store = ConfigStore.instance()
    folders = tuple(Path(f).resolve() for f in (conf_dir(), *config_dirs))
    for name in sorted({p.stem for folder in folders for p in (folder / "model").glob("*.yaml")} - _OFFERED):
        _OFFERED.add(name)
        model = {"/model@_here_": name}
        mounted = [{"/recipe@recipe": "default"}, {"/augment@augment": "crop_flip"}]
        for role, defaults in (("student", [model, "_self_"]), ("teacher", [model, *mounted, "_self_"])):
            if not any((folder / role / f"{name}.yaml").exists() for folder in folders):
                store.store(group=role, name=name, node={"defaults": defaults})


_OFFERED: set[str] = set()  # models that this process has stored: each costs a millisecond or two


def compose(*overrides: str, config_dir: str | Path | None = None, config_name: str = "train") -> Config:
    """The configuration that `python -m kd.<config_name> OVERRIDES` would run; `config_dir` as `--config-dir`.

    Raises ConfigError with the near misses.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register([Path(config_dir)] if config_dir else [])
    overrides = [rewrite(o) for o in overrides]
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose(config_name, [*overrides, *search])
    except (HydraException, OmegaConfBaseException) as error:
        from kd.cli import explain

        raise ConfigError(explain(error)) from error
    return settle(composed, overrides)


def rewrite(override: str) -> str:
    """An override as Hydra wants it spelt.

    `teacher.recipe=NAME` chooses from the group mounted there: recipe@teacher.recipe=NAME. Keys below `args` and below a
    loss term are constructor arguments, which need not stand in the YAML to be set: ++student.args.width=4.
    """
    for group in ("recipe", "augment"):
        if override.startswith(f"teacher.{group}="):
            return f"{group}@{override}"
    return f"++{override}" if FREE.match(override) else override


def settle(composed: DictConfig, typed: Sequence[str] = (), strict: bool = True) -> Config:
    """The typed settings of one run, inapplicable parts dropped; ConfigError for what contradicts or has no effect.

    `typed` are the overrides of the command line; with `strict` those without effect are errors.
    """
    reject_unknown_keys(composed)
    typed_keys = [o.lstrip("+~").split("=", 1)[0] for o in typed]
    require(composed)
    cfg = OmegaConf.to_object(composed)
    choose_length(cfg.recipe, "recipe", typed_keys)
    choose_length(cfg.teacher.recipe, "teacher.recipe", typed_keys)
    check_values(cfg)
    reject_stumps(cfg)
    if strict:
        reject_idle_settings(cfg, typed_keys)
    return cfg


def require(composed: DictConfig) -> None:
    """Every mandatory value is there."""
    missing = sorted(k for k in OmegaConf.missing_keys(composed) if not k.startswith("hydra"))
    if missing:
        key = missing[0]
        raise ConfigError(f"{key} is missing. Type {key}=..., or choose a preset: {key.split('.')[0]}=NAME")


def reject_unknown_keys(node: DictConfig, path: str = "") -> None:
    """A key that `+` slipped past the schema is as wrong as one without it."""
    kind = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    for key in node:
        full = f"{path}{key}"
        if known is not None and key not in known:
            raise ConfigError(f"there is no setting '{full}'.{did_you_mean(full, setting_keys())}")
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            reject_unknown_keys(node[key], f"{full}.")


def setting_keys(kind: type | None = None, path: str = "") -> list[str]:
    """Every key of the schema, dotted; without a kind, of every entry point."""
    if kind is None:
        return list(
            dict.fromkeys(
                k for entry in (EvaluateConfig, CheckConfig, ExportConfig, BenchmarkConfig) for k in setting_keys(entry)
            )
        )
    keys = []
    for item in dataclasses.fields(kind):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        keys.append(path + item.name)
        if dataclasses.is_dataclass(default):
            keys += setting_keys(type(default), f"{path}{item.name}.")
    return keys


def choose_length(recipe: Recipe, path: str, typed_keys: Sequence[str]) -> None:
    """Keep one of epochs, steps and minutes: the typed one, else an overlay's, else the recipe's."""
    given = [n for n in LENGTHS if getattr(recipe, n) is not None]
    typed = [n for n in given if f"{path}.{n}" in typed_keys]
    chosen = typed or [n for n in given if n != "epochs"] or given
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join(f'{path}.{n}={getattr(recipe, n):g}' for n in chosen)} are both set; "
            f"a run has one length: keep one of {', '.join(f'{path}.{n}' for n in LENGTHS)}"
        )
    for name in LENGTHS:
        if name not in chosen:
            setattr(recipe, name, None)


CHOICES = {
    "augment.teacher_view": ("same", "independent", "clean"),
    "baseline": ("train", "find", "off"),
    "give_up": ("median", "off"),
    "dataset.on_error": ("raise", "skip"),
    "dataset.select": ("val", "test"),
    "format": ("onnx", "torch_export", "executorch"),
    "recipe.compile": ("auto", "on", "off"),
    "recipe.precision": ("auto", "fp32", "bf16"),
    "recipe.schedule": ("cosine", "multistep", "constant"),
    "quantize": ("int8",),
    "split": ("train", "val", "test"),
    "teacher.average": ("probs", "logits"),
    "teacher.cache": ("auto", "on", "off"),
    "tracker.mode": ("auto", "online", "offline"),
    "tracker.name": ("wandb", "none"),
}
POSITIVE = (
    "recipe.lr",
    "recipe.batch_size",
    "recipe.epochs",
    "recipe.steps",
    "recipe.minutes",
    "recipe.accumulate",
    "recipe.val_every",
    "calibration",
    "seconds",
)
FRACTIONS = (
    "dataset.train_fraction",
    "dataset.val_fraction",
    "teacher.train_fraction",
    "teacher.min_top1",
    "recipe.ema",
    "recipe.warmup",
)


def check_values(cfg: Config) -> None:
    """Numbers in range and words that mean something, or ConfigError with what would be."""
    for key, words in CHOICES.items():
        for full, value in _values(cfg, key):
            meant = {"True": "on", "False": "off"}.get(value)  # YAML reads a bare on and off as booleans
            if meant in words:
                value = meant  # noqa: PLW2901
                _set(cfg, full, value)
            if value not in words:
                raise ConfigError(
                    f"{full}={value}: expected one of {', '.join(words)}.{did_you_mean(str(value), words)}"
                )
    for key in POSITIVE:
        for full, value in _values(cfg, key):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{full}={value}: expected a finite number above 0, such as {full}={_example(key)}")
    for key in FRACTIONS:
        for full, value in _values(cfg, key):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{full}={value}: expected a fraction from 0 to 1")
    if cfg.dataset.train_fraction == 0:
        raise ConfigError("dataset.train_fraction=0 leaves nothing to train on; expected a fraction above 0")
    if not math.isfinite(cfg.recipe.weight_decay) or cfg.recipe.weight_decay < 0:
        raise ConfigError(f"recipe.weight_decay={cfg.recipe.weight_decay}: expected a finite number, 0 or above")


def _example(key: str) -> str:
    return {"recipe.lr": "0.001", "recipe.batch_size": "64"}.get(key, "1")


def _values(cfg: Config, key: str) -> list[tuple[str, Any]]:
    """The value at `key`, and at the same place below the teacher where its recipe and augment are mounted."""
    mounted = [f"teacher.{key}"] if key.startswith(("recipe.", "augment.")) else []
    found = []
    for full in (key, *mounted):
        node = cfg
        for part in full.split("."):
            node = getattr(node, part, None) if node is not None else None
        if node is not None:
            found.append((full, node))
    return found


def _set(cfg: Config, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = cfg
    for part in path:
        node = getattr(node, part)
    setattr(node, last, value)


def reject_stumps(cfg: Config) -> None:
    """A loss term without `_target_` is what an override of a term leaves that the chosen losses do not have."""
    for name, term in cfg.loss.items():
        if not isinstance(term, dict) or "_target_" not in term:
            whole = [n for n, t in cfg.loss.items() if isinstance(t, dict) and "_target_" in t]
            raise ConfigError(
                f"loss.{name} has no _target_: the chosen loss has the terms {', '.join(whole)}, not {name}."
                f"{did_you_mean(name, whole)} Choose it too (loss=[...,{name}]), or drop the setting"
            )


def reject_idle_settings(cfg: Config, typed_keys: Sequence[str]) -> None:
    """A setting that the user typed and that would change nothing is a mistake, and is said."""
    for key in typed_keys:
        reason = idle_reason(cfg, key)
        if reason:
            raise ConfigError(f"{key} would have no effect: {reason}. Leave it out, or change what switches it off.")


def idle_reason(cfg: Config, key: str) -> str | None:
    """Why a typed setting changes nothing in this run, or None."""
    alone, auto = cfg.teacher.name == "none", cfg.teacher.checkpoint == "auto"
    own_training = key.startswith(("teacher.recipe.", "teacher.augment.")) or key in (
        "teacher.seed",
        "teacher.train_fraction",
    )
    if alone and key.startswith(("teacher.", "recipe@teacher.", "augment@teacher.")):
        return "teacher=none, there is no teacher"
    if alone and key == "augment.teacher_view":
        return "teacher=none, only the student sees the images"
    if own_training and not auto:
        return f"the teacher comes from teacher.checkpoint={cfg.teacher.checkpoint}, it is not trained here"
    if key == "teacher.classes" and auto:
        return "a teacher that is trained here learns the dataset's classes in their order"
    if key in ("teacher.members", "teacher.average") and cfg.teacher.name != "ensemble":
        return f"teacher={cfg.teacher.name} is one network; several are teacher=ensemble"
    if key == "augment.flip" and cfg.augment.flip and not cfg.dataset.mirror:
        return f"dataset.mirror=false, a mirrored image of {cfg.dataset.name} would not keep its class"
    if key in ("recipe.milestones", "recipe.decay") and cfg.recipe.schedule != "multistep":
        return f"recipe.schedule={cfg.recipe.schedule} has no milestones"
    return None
