"""A teacher, looked at before it teaches: as good through the distillation path as by itself, and if not good, why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kd import metrics
from kd.check.causes import Case, cause, entropy, percent
from kd.check.finding import Finding
from kd.check.suspects import spread
from kd.ensemble import Ensemble

PARITY = 128  # images on which the teacher's own path and the distillation path are compared
LOST = 0.05  # of probability in the mean over images, or of top-1: more than bfloat16 costs
NARROW, WIDE = 0.01, 0.995  # entropy over log K outside which a softened teacher says nothing that labels do not


def diagnose(loaded: Any, dataset: Any, cfg: Any, device: str, half: bool) -> tuple[dict[str, float], list[Finding]]:
    """(figures, findings) of a teacher: `loaded.classifier` frozen, `loaded.original` as it was saved.

    Figures by flat names: `val/top1`, `val/nll`, `val/ece`, `entropy/1`, `entropy/kd/4`, `own/top1`, `path/top1`. Costs
    a pass over the validation split, and some hundred images more where the teacher is from elsewhere and not
    obviously good. `teacher.min_top1=0` makes a warning of everything.
    """
    from kd import teacher

    name, split, logits = teacher.hear(loaded.classifier, dataset, device, half)
    quick = {**metrics.quick(logits, split.targets), "ece": metrics.calibration_error(logits.softmax(1), split.targets)}
    figures = metrics.named(name, quick) | entropies(logits, cfg.loss)
    own, findings = compare_paths(loaded, split, device, half)
    figures |= own
    findings += temperatures(figures) + frozen(loaded.classifier)
    for case, digest in cases(loaded, split, dataset.classes, device, half):
        if digest is None or digest != dataset.digest:  # else trained by kd on these very images: all its own
            if case.network is loaded.classifier:
                case.logits = logits  # heard already
            findings += [found] if (found := cause(case)) else []
    top1, least = quick["top1"], teacher.floor(cfg, dataset.num_classes)
    if top1 < least and not any(f.stops for f in findings):
        findings.append(weak(cfg, top1, least))
    if cfg.teacher.min_top1 == 0:
        findings = [Finding(f.code, f.text, f.fix, stops=False) for f in findings]
    return figures, findings


def once(loaded: Any, dataset: Any, cfg: Any, device: str, half: bool) -> tuple[dict[str, float], list[Finding]]:
    """`diagnose`, remembered in this process: a sweep has many students for one teacher."""
    key = (repr(loaded.source), repr(cfg.teacher), repr(cfg.loss), dataset.digest, device, half)
    if key not in _DIAGNOSED:
        _DIAGNOSED[key] = diagnose(loaded, dataset, cfg, device, half)
    figures, findings = _DIAGNOSED[key]
    return dict(figures), list(findings)


_DIAGNOSED: dict[tuple, tuple[dict[str, float], list[Finding]]] = {}


def cases(loaded: Any, split: Any, classes: list[str], device: str, half: bool) -> list[tuple[Case, str | None]]:
    """The teacher, or each member of an ensemble, with the digest of the data that it was trained on."""
    if not isinstance(loaded.classifier, Ensemble):
        return [(Case("the teacher", loaded.classifier, split, classes, device, half), loaded.digest)]
    members = enumerate(zip(loaded.classifier.members, loaded.members, strict=True), start=1)
    return [(Case(f"member {i} of the ensemble", f, split, classes, device, half), m.digest) for i, (f, m) in members]


def weak(cfg: Any, top1: float, least: float) -> Finding:
    """The teacher knows too little, for no reason that was found."""
    return Finding(
        "weak",
        f"the teacher {cfg.teacher.name} has a top-1 of {percent(top1)} through the path it teaches by, below "
        f"{percent(least)} (teacher.min_top1)",
        "Are these weights of this dataset? Train it longer (teacher.recipe.epochs=...) or give another "
        "(teacher.checkpoint=PATH); teacher.min_top1=0 lets it teach all the same",
    )


def soft_temperatures(terms: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """{`term/T`: (T, whether logits are standardised first)} of the terms that soften the teacher's logits."""
    from kd import losses

    found = {}
    for name, term in losses.build(terms).terms.items():
        if isinstance(term, (losses.LogitTerm, losses.OneForAll)):
            values = [getattr(term, "temperature", None), *getattr(term, "temperatures", ())]
            values += getattr(term, "weak_temperatures", ())
            found |= {f"{name}/{t:g}": (float(t), getattr(term, "standardise", False)) for t in values if t}
    return found


def entropies(logits: Tensor, terms: Mapping[str, Any]) -> dict[str, float]:
    """`entropy/1` and `entropy/TERM/T`: how soft the teacher's answers are, as a fraction of log K."""
    from kd.losses.numerics import standardise

    found = {"entropy/1": entropy(logits)}
    for name, (t, scaled) in soft_temperatures(terms).items():
        found[f"entropy/{name}"] = entropy((standardise(logits) if scaled else logits) / t)
    return found


def temperatures(figures: Mapping[str, float]) -> list[Finding]:
    """A word on a temperature at which the teacher says nothing beyond the label, or nothing at all."""
    found = []
    for name, value in figures.items():
        if name.count("/") != 2 or not name.startswith("entropy/") or NARROW <= value <= WIDE:
            continue
        _, term, t = name.split("/")
        state, better = ("uniform", float(t) / 2) if value > WIDE else ("one-hot", 2 * float(t))
        text = (
            f"at temperature {t} of the term {term} the teacher's answers are almost {state} (entropy {percent(value)})"
        )
        found.append(Finding("temperature", text, f"Try loss.{term}.temperature={better:g}", stops=False))
    return found


def compare_paths(loaded: Any, split: Any, device: str, half: bool) -> tuple[dict[str, float], list[Finding]]:
    """Top-1 and probabilities through the distillation path (frozen, folded, bf16) and of the model itself."""
    few = spread(split, PARITY)
    original = loaded.original.to(device).eval()
    own = metrics.logits_of(lambda x: original(x).logits, few, device)
    path = metrics.logits_of(lambda x: loaded.classifier(x).logits, few, device, half)
    tops = [(x.argmax(1) == few.targets).double().mean().item() for x in (own, path)]
    moved = (own.softmax(1) - path.softmax(1)).abs().sum(1).mean().item() / 2  # total variation
    figures = {"own/top1": tops[0], "path/top1": tops[1], "path/distance": moved}
    if moved <= LOST and abs(tops[0] - tops[1]) <= max(LOST, 2 / len(few)):
        return figures, []
    text = (
        f"the teacher has a top-1 of {percent(tops[0])} by itself and {percent(tops[1])} through the path it teaches "
        f"by ({len(few)} images; probabilities differ by {moved:.3f} in the mean)"
    )
    fix = "Type recipe.precision=fp32" if half else "Its batch norm could not be folded exactly; please report it"
    return figures, [Finding("path", text, fix)]


def frozen(classifier: nn.Module) -> list[Finding]:
    """The teacher is in eval mode and has no gradient."""
    if any(m.training for m in classifier.modules()) or any(p.requires_grad for p in classifier.parameters()):
        return [Finding("path", "the teacher is not frozen: in training mode, or with gradients", "Please report it")]
    return []
