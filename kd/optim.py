"""The optimiser and its learning rate. The rate is a pure function of the step, so a resume needs the step alone."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from types import MethodType

import torch
from torch import nn

from kd import late
from kd.config import Recipe

OWN = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(recipe: Recipe, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """The recipe's optimiser over the modules' parameters; biases and norms are not decayed unless `decay_all`.

    sgd, adam and adamw are torch's, with torch's arguments (timm costs seconds to import); any other name is timm's.
    """
    modules = nn.ModuleList(modules)
    if recipe.optimizer not in OWN:
        return _from_timm(recipe, modules)
    late.unmarked(torch.optim.Optimizer)
    arguments = {"lr": recipe.lr, **recipe.optimizer_args}
    if recipe.optimizer == "sgd":
        arguments = {"momentum": 0.9, "nesterov": recipe.optimizer_args.get("momentum", 0.9) > 0, **arguments}
    else:
        arguments = {"fused": True, **arguments}
    return plain_step(OWN[recipe.optimizer](_groups(modules, recipe), **arguments))


def plain_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimiser, whose `step` does not import the compiler either; step hooks are not called."""
    wrapped = [type(optimizer).step]
    while hasattr(wrapped[-1], "__wrapped__"):
        wrapped.append(wrapped[-1].__wrapped__)
    names = [getattr(w, "__code__", None) and w.__code__.co_name for w in wrapped]
    if "_use_grad" in names and not optimizer.defaults.get("differentiable"):
        optimizer.step = MethodType(torch.no_grad()(wrapped[-1]), optimizer)
    return optimizer


def _groups(modules: nn.Module, recipe: Recipe) -> list[dict]:
    parameters = [p for p in modules.parameters() if p.requires_grad]
    plain = [] if recipe.decay_all else [p for p in parameters if p.ndim <= 1]
    decayed = parameters if recipe.decay_all else [p for p in parameters if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _from_timm(recipe: Recipe, modules: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    from kd.hints import ConfigError, did_you_mean

    if recipe.optimizer not in list_optimizers():
        hint = did_you_mean(recipe.optimizer, list_optimizers())
        raise ConfigError(f"recipe.optimizer={recipe.optimizer}: neither torch nor timm has it.{hint}")
    return create_optimizer_v2(
        modules,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        filter_bias_and_bn=not recipe.decay_all,
        **recipe.optimizer_args,
    )


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate of a step (from 0): linear warm-up, then the recipe's schedule."""
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if recipe.schedule == "multistep":
        return recipe.lr * recipe.decay ** bisect.bisect_right(recipe.milestones, step / steps_per_epoch)
    return recipe.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
