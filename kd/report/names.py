"""Short names for networks, losses and budgets, told apart by what differs where two would be called the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from kd.config import conf_dir

MOST = 3  # differing settings that a name shows


def key(settings: Any) -> str:
    """Equal settings, equal keys."""
    return json.dumps(settings, sort_keys=True)


@functools.cache
def presets() -> list[tuple[str, dict[str, Any]]]:
    """conf/model: file names and contents."""
    read = ((p.stem, yaml.safe_load(p.read_text(encoding="utf-8"))) for p in sorted(conf_dir().glob("model/*.yaml")))
    return [(name, model) for name, model in read if isinstance(model, dict) and "name" in model]


def network(settings: Mapping[str, Any]) -> str:
    """The preset that a model's settings are, with the arguments that differ from it; else the network's own name."""
    args = settings.get("args") or {}

    def fits(preset: dict[str, Any]) -> bool:
        own = preset.get("args") or {}
        return preset["name"] == settings["name"] and all(args.get(k) == v for k, v in own.items())

    near = [(len(p.get("args") or {}), name, p.get("args") or {}) for name, p in presets() if fits(p)]
    if not near:
        return " ".join([settings["name"], *(f"{k} {v}" for k, v in sorted(args.items()) if k != "_target_")])
    _, name, own = max(near, key=lambda found: (found[0], -len(found[1])))
    return " ".join([name, *(f"{k} {v}" for k, v in sorted(args.items()) if k not in own)])


def teacher(settings: Mapping[str, Any]) -> str:
    """A teacher's network, and the epoch at which it was kept; an ensemble's members."""
    if settings["name"] == "none":
        return "none"
    if settings.get("members"):
        return "ensemble of " + ", ".join(str(m).rstrip("/").rsplit("/", 1)[-1] for m in settings["members"])
    kept = f" at epoch {settings['epoch']}" if settings.get("epoch") is not None else ""
    return network(settings) + kept


def loss(terms: Mapping[str, Any]) -> str:
    """The terms beside cross-entropy."""
    return "+".join(n for n in terms if n != "ce") or "ce"


def length(recipe: Mapping[str, Any]) -> str:
    """How long a recipe trains."""
    for name in ("steps", "minutes", "epochs"):
        if recipe.get(name) is not None:
            return f"{recipe[name]:g} {name}"
    return "unknown length"


def distinct(named: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """(name, settings) -> a name for each `key(settings)`; where two share one, the settings that differ are added."""
    by_name: dict[str, dict[str, Any]] = {}
    for name, settings in named:
        by_name.setdefault(name, {})[key(settings)] = settings
    found = {}
    for name, group in by_name.items():
        flat = {k: flatten(s) for k, s in group.items()}
        paths = sorted({p for f in flat.values() for p in f})
        differing = [p for p in paths if len({json.dumps(f.get(p)) for f in flat.values()}) > 1]
        for k, values in flat.items():
            shown = ", ".join(f"{_short(p)}={_value(values.get(p))}" for p in differing[:MOST])
            found[k] = f"{name} ({shown})" if differing else name
    return found


def flatten(settings: Any, path: str = "") -> dict[str, Any]:
    """A tree of dictionaries as dotted keys."""
    if not isinstance(settings, Mapping):
        return {path: settings}
    return {p: v for k, s in settings.items() for p, v in flatten(s, f"{path}.{k}" if path else str(k)).items()}


def _short(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
