"""Optimisers, learning rates, and what an eager run does not import."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from kd.config import Recipe
from kd.hints import ConfigError
from kd.optim import learning_rate, make_optimizer, set_learning_rate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def train(optimizer, net, steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        net(torch.sin(torch.arange(24.0).view(6, 4) + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("name", "args", "theirs"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": False}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
        ("sgd", {}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        ("adamw", {"fused": False}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01)),
        ("adam", {"betas": [0.8, 0.9]}, lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.9), weight_decay=0.01, fused=True)),
    ],
)
def test_torch_s_own_bit_for_bit(name, args, theirs):
    recipe = Recipe(optimizer=name, lr=0.1, weight_decay=0.01, optimizer_args=args, decay_all=True)
    ours, other = network(), network()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            train(make_optimizer(recipe, [ours]), ours), train(theirs(other.parameters()), other), strict=True
        )
    )


def test_its_state_can_be_saved_and_restored():
    recipe, whole, parts = Recipe(lr=0.1), network(), network()
    train(make_optimizer(recipe, [whole]), whole, 5)
    first = make_optimizer(recipe, [parts])
    train(first, parts, 5)
    second = make_optimizer(recipe, [parts])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again = make_optimizer(recipe, [whole])
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(train(second, parts), train(again, whole), strict=True))


def test_biases_and_norms_are_not_decayed_unless_asked():
    net = network()
    groups = make_optimizer(Recipe(weight_decay=0.5), [net]).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.5, 2), (0.0, 4)]
    groups = make_optimizer(Recipe(weight_decay=0.5, decay_all=True), [net]).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.5, 6)]


def test_timm_s_optimisers_and_no_others():
    net = network()
    assert type(make_optimizer(Recipe(optimizer="lion"), [net])).__name__ == "Lion"
    with pytest.raises(ConfigError, match=r"neither torch nor timm has it\. Did you mean"):
        make_optimizer(Recipe(optimizer="adamww"), [net])


@pytest.mark.parametrize(
    ("recipe", "step", "rate"),
    [
        (Recipe(lr=1.0, schedule="constant", warmup=0.0), 50, 1.0),
        (Recipe(lr=1.0, schedule="constant", warmup=0.1), 4, 5 / 11),
        (Recipe(lr=1.0, schedule="cosine", warmup=0.0), 0, 1.0),
        (Recipe(lr=1.0, schedule="cosine", warmup=0.0), 50, 0.5),
        (Recipe(lr=1.0, schedule="multistep", warmup=0.0, milestones=[2, 4]), 19, 1.0),
        (Recipe(lr=1.0, schedule="multistep", warmup=0.0, milestones=[2, 4]), 20, 0.1),
        (Recipe(lr=1.0, schedule="multistep", warmup=0.0, milestones=[2, 4]), 99, 0.01),
    ],
)
def test_learning_rates(recipe, step, rate):
    assert learning_rate(recipe, step, steps=100, steps_per_epoch=10) == pytest.approx(rate)


def test_the_rate_reaches_every_group():
    optimizer = make_optimizer(Recipe(), [network()])
    set_learning_rate(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]


def test_an_eager_run_of_our_own_networks_imports_neither_compiler_nor_timm(tiny):
    teacher = ["teacher=resnet8", "teacher.recipe.steps=2", "teacher.min_top1=0", "baseline=off", "sweep_name=test"]
    program = (
        "import sys; from kd import compose, run; run(compose(*sys.argv[1:]))\n"
        "slow = ('torch._dynamo', 'torch._inductor', 'timm', 'torchvision', 'torchmetrics', 'wandb', 'matplotlib')\n"
        "print('imported:', [n for n in slow if n in sys.modules])"
    )
    options = ["recipe.steps=2", "recipe.ema=0.9", "recipe.clip_grad=1.0"]
    command = [sys.executable, "-c", program, *tiny, *teacher, *options]
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    assert end.stdout.splitlines()[-1] == "imported: []"
