"""A loss is a weighted sum of named terms."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd.contracts import Batch, Output
from kd.hints import did_you_mean
from kd.losses.term import Term


def locate(path: str) -> type[Term]:
    """The class behind a dotted path such as `kd.losses.SoftTargets`.

    Raises ValueError where there is none, with the near misses, and where it is no Term.
    """
    module, _, name = str(path).rpartition(".")
    if not module:
        raise ValueError(f"_target_: {path} is no dotted path, such as kd.losses.SoftTargets")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"cannot find {path} ({error})") from error
    if not hasattr(found, name):
        near = difflib.get_close_matches(name, getattr(found, "__all__", dir(found)), n=3)
        raise ValueError(f"cannot find {path}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    cls = getattr(found, name)
    if not (isinstance(cls, type) and issubclass(cls, Term)):
        raise ValueError(f"{path} is no subclass of kd.losses.Term")
    return cls


def make(name: str, spec: Mapping) -> Term:
    """The term that {_target_: class, weight: ..., ...} describes. Raises ValueError, naming the term."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"loss term '{name}' is {spec!r}; expected _target_, weight and the class's own keys")
    arguments = dict(spec)
    target = arguments.pop("_target_", None)
    if target is None:
        raise ValueError(
            f"loss term '{name}' has no _target_: its keys {sorted(arguments)} override a term that the chosen loss "
            f"does not have. Add it (loss=[...,{name}]) or drop the override."
        )
    try:
        term = locate(target)(**arguments)
        if isinstance(heat := getattr(term, "temperature", 1.0), (int, float)) and not heat > 0:
            raise ValueError(f"temperature={heat:g}: expected a number above 0")
        return term
    except ValueError as error:
        raise ValueError(f"loss term '{name}': {error}") from error
    except TypeError as error:
        known = sorted({k for c in locate(target).__mro__ if issubclass(c, Term) for k in options_of(c)})
        strange = [k for k in arguments if k not in known]
        said = (
            f"there is no {strange[0]}.{did_you_mean(strange[0], known)} It takes {', '.join(known)}"
            if strange
            else error
        )
        raise ValueError(f"loss term '{name}' ({target}): {said}") from error


def options_of(cls: type) -> list[str]:
    """The named arguments of a class's own constructor."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(cls.__init__).parameters.values() if "__init__" in vars(cls) else ()
    return [p.name for p in found if p.kind in kinds and p.name != "self"]


def build(terms: Mapping[str, Mapping]) -> LossSum:
    """The sum that a mapping {name: {_target_: class, weight: ..., ...}} describes.

    Raises ValueError for a term without `_target_`, one that cannot be found, or one given an argument it does not
    take.
    """
    return LossSum({name: make(name, spec) for name, spec in terms.items()})


class LossSum(nn.Module):
    """Terms by name; gives the weighted total and each term's own value.

    Raises ValueError where nothing would be trained on: no term at all, or only terms of a first stage.
    """

    def __init__(self, terms: Mapping[str, Term]):
        super().__init__()
        if all(term.first_epochs is not None or not term.weight for term in terms.values()):
            raise ValueError(
                f"the loss {list(terms) or '{}'} has no term that counts after the first stage: a weight is 0, or "
                "every term has first_epochs. Add one, such as loss=[ce,...]"
            )
        self.terms = nn.ModuleDict(terms)
        self.student_features = sorted({f for t in terms.values() for f in t.student_features})
        self.teacher_features = sorted({f for t in terms.values() for f in t.teacher_features})
        self.views = max((t.views for t in terms.values()), default=1)
        self.needs_teacher = any(t.needs_teacher for t in terms.values())

    def setup(self, student: Output, teacher: Output | None, num_classes: int, num_samples: int) -> None:
        """Let every term size its projections from one dry forward of the two models."""
        for name, term in self.terms.items():
            try:
                term.setup(student, teacher, num_classes, num_samples)
            except ValueError as error:
                raise ValueError(f"loss term '{name}': {error}") from error

    def counting(self, epoch: float) -> list[str]:
        """The terms that count at this epoch: those of a first stage while it lasts, all others after it."""
        first = [n for n, t in self.terms.items() if t.first_epochs is not None and epoch < t.first_epochs]
        names = first or [n for n, t in self.terms.items() if t.first_epochs is None]
        return [n for n in names if self.terms[n].weight]

    def factors(self, epoch: float) -> dict[str, float]:
        """Each term's factor at this epoch: its weight on the warm-up; 0 where it does not count."""
        counting, factors = set(self.counting(epoch)), {}
        for name, term in self.terms.items():
            ramp = min(1.0, epoch / term.warmup_epochs) if term.warmup_epochs else 1.0
            factors[name] = term.weight * ramp if name in counting else 0.0
        return factors

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(total, {name: unweighted scalar}) of the terms that count at this epoch, at the foot of a warm-up too."""
        factors = self.factors(batch.epoch)
        values, total = {}, student.logits.new_zeros((), dtype=torch.float32)
        for name in self.counting(batch.epoch):
            values[name] = self.terms[name](student, teacher, batch)
            total = total + factors[name] * values[name]
        return total, values

    def describe(self) -> str:
        """The sum in words, such as `0.1 ce + 0.9 kd (temperature 4)`."""
        return " + ".join(f"{t.weight:g} {n}{self._details(t)}" for n, t in self.terms.items())

    @staticmethod
    def _details(term: Term) -> str:
        shown = [f"temperature {term.temperature:g}"] if getattr(term, "temperature", None) else []
        shown += ["standardised"] if getattr(term, "standardise", False) else []
        shown += [f"warm-up {term.warmup_epochs:g} epochs"] if term.warmup_epochs else []
        shown += [f"first {term.first_epochs:g} epochs alone"] if term.first_epochs else []
        return f" ({', '.join(shown)})" if shown else ""
