"""Several teachers as one: the mean of their probabilities or of their logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.config import Config, Student, Teacher, conf_dir
from kd.contracts import Output
from kd.hints import ConfigError, did_you_mean


class Ensemble(nn.Module):
    """Classifiers of the same classes that answer together; each prepares the images in its own way. No features."""

    def __init__(self, members: Sequence[nn.Module], average: str = "probs"):
        """`average`: `probs` (arithmetic mean) or `logits` (geometric); Hinton et al. 2015 (arXiv:1503.02531)."""
        super().__init__()
        self.members, self.average = nn.ModuleList(members), average

    @property
    def classes(self) -> list[str] | None:
        """The classes' names, as the first member that knows them has them."""
        return next((m.classes for m in self.members if m.classes), None)

    @property
    def num_classes(self) -> int:
        """K, the width of the logits."""
        return self.members[0].num_classes

    def forward(self, images: Tensor, features: Sequence[str] = ()) -> Output:
        """Logits (B, K). Raises ValueError for any feature: the members' are not comparable."""
        if wanted := [f for f in features if f != "logits"]:
            raise ValueError(
                f"an ensemble has no '{wanted[0]}': its members' features have other widths and other meanings. "
                "Choose terms on logits, such as loss=kd, dkd, dist, ttm or ofa, or one teacher"
            )
        logits = self.combine(
            torch.stack([m(images).logits.to(torch.float32, copy=True) for m in self.members])
        )  # (B, K)
        return Output(logits, {"logits": logits} if "logits" in features else {})

    def combine(self, logits: Tensor) -> Tensor:
        """(M, B, K) -> (B, K): the log of the mean probability, or the mean logit."""
        if self.average == "logits":
            return logits.mean(0)
        return logits.log_softmax(2).logsumexp(0) - torch.tensor(float(len(logits))).log()


def check_members(cfg: Config) -> None:
    """ConfigError for an ensemble without members, or with the same one twice, or members without an ensemble."""
    members = cfg.teacher.members
    if len(members) < 2:
        raise ConfigError(
            f"teacher=ensemble has {len(members)} members: type teacher.members=[resnet20,resnet56,RUN_DIR], two or "
            "more. NAME@1 is the same network trained with seed 1, NAME:PATH a network with weights from a file"
        )
    if twice := sorted({m for m in members if members.count(m) > 1}):
        raise ConfigError(
            f"teacher.members has {twice[0]} twice: it would only count double. Another seed of a preset: {twice[0]}@1"
        )
    if cfg.teacher.checkpoint != "auto":
        raise ConfigError(
            "teacher.checkpoint has no meaning for an ensemble: type the paths into teacher.members=[PATH,NAME:PATH]"
        )


def member_config(cfg: Config, member: str) -> Config:
    """The same settings with one member as the teacher: PATH, NAME, NAME@SEED or NAME:PATH."""
    base = dataclasses.replace(cfg.teacher, members=[], checkpoint="auto")
    if Path(member).expanduser().exists():
        return dataclasses.replace(cfg, teacher=dataclasses.replace(base, name=Path(member).name, checkpoint=member))
    name, _, path = member.partition(":")
    name, _, seed = name.partition("@")
    if seed and not seed.isdigit():
        raise ConfigError(f"teacher.members: {member}: expected NAME@SEED with a whole number, such as {name}@1")
    model = named_model(name)
    preprocess = {k: v for k, v in vars(base.preprocess).items() if v is not None}
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(Student)} | {"checkpoint": path or "auto"}
    teacher = Teacher(**{**{f.name: getattr(base, f.name) for f in dataclasses.fields(Teacher)}, **given})
    teacher.preprocess = dataclasses.replace(model.preprocess, **preprocess)
    teacher.seed = int(seed or base.seed)
    teacher.pretrained = (
        bool(base.pretrained) and "_target_" not in model.args and not path
    )  # the config's rule, settled before
    return dataclasses.replace(cfg, teacher=teacher)


def named_model(name: str) -> Student:
    """The network of model/NAME.yaml, or one of timm's; ConfigError with the near misses."""
    from omegaconf import OmegaConf

    folder = conf_dir() / "model"
    if (folder / f"{name}.yaml").is_file():
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Student), OmegaConf.load(folder / f"{name}.yaml"))
        )
    from kd.models.sizing import check_name

    try:
        check_name(name)
    except ValueError as error:
        near = did_you_mean(name, [p.stem for p in folder.glob("*.yaml")])
        raise ConfigError(
            f"teacher.members: {name} is no path, no preset and no network of timm.{near} {error}"
        ) from error
    return Student(name=name)


def gather(cfg: Config, obtain: Callable[[Config], Any]) -> tuple[Ensemble, dict[str, Any], list[Any]]:
    """(the ensemble, its source for the record, its members as `obtain` gave them)."""
    check_members(cfg)
    loaded = [obtain(member_config(cfg, m)) for m in cfg.teacher.members]
    source = {
        "average": cfg.teacher.average,
        "members": [{"member": m, **one.source} for m, one in zip(cfg.teacher.members, loaded, strict=True)],
    }
    return Ensemble([one.classifier for one in loaded], cfg.teacher.average), source, loaded
