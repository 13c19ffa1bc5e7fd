"""A teacher, looked at before it teaches: is it as good through the distillation path as by itself, and if not good, why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd import metrics, suspects
from kd.ensemble import Ensemble
from kd.finding import Finding
from kd.hints import UserError
from kd.suspects import some, spread

PARITY = 128  # images on which the teacher's own path and the distillation path are compared
LOST = 0.05  # of probability, in the mean over images, or of top-1: more than bfloat16 costs
GOOD = 0.95  # top-1 above which nothing can be wrong that is worth looking for


def diagnose(loaded: Any, dataset: Any, cfg: Any, device: str, half: bool) -> tuple[dict[str, Any], list[Finding]]:
    """(figures, findings) of a teacher: `loaded.classifier` frozen, `loaded.original` as it was saved.

    Figures by flat names (`val/top1`, `val/nll`, `val/ece`, `entropy/kd/4`, `own/top1`). Costs one pass over the validation
    split, and a few hundred images more where the teacher is from elsewhere and not obviously good.
    """
    from kd import teacher

    name, split, logits = teacher.hear(loaded.classifier, dataset, device, half)
    figures = metrics.named(
        name, {**metrics.quick(logits, split.targets), "ece": ece(logits.softmax(1), split.targets)}
    )
    figures |= {f"entropy/{term}": value for term, value in entropies(logits, cfg.loss).items()}
    own, findings = compare_paths(loaded, split, device, half)
    figures |= own
    findings += temperatures(figures)
    findings += frozen(loaded.classifier)
    findings += causes(loaded, dataset, split, logits, cfg, device, half)
    top1, least = figures[f"{name}/top1"], teacher.floor(cfg, dataset.num_classes)
    if top1 < least and not any(f.stops for f in findings):
        findings.append(weak(cfg, top1, least))
    if cfg.teacher.min_top1 == 0:
        findings = [Finding(f.code, f.text, f.fix, stops=False) for f in findings]
    return figures, findings


def weak(cfg: Any, top1: float, least: float) -> Finding:
    """The teacher knows too little, for no reason that was found."""
    return Finding(
        "weak",
        f"the teacher {cfg.teacher.name} has a top-1 of {percent(top1)} through the path it teaches by, below {percent(least)} "
        "(teacher.min_top1)",
        "Train it longer (teacher.recipe.epochs=...) or give another (teacher.checkpoint=PATH); teacher.min_top1=0 lets it "
        "teach all the same",
    )


def percent(fraction: float) -> str:
    """As people read it."""
    return f"{100 * fraction:.1f} %"


def ece(probs: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): mean gap of confidence and accuracy over equal bins."""
    confidence, guesses = probs.double().max(1)
    right = (guesses == targets).double()
    bucket = (confidence * bins).ceil().long().clamp(1, bins) - 1  # (N,)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bucket, confidence - right)
    return gaps.abs().sum().item() / len(targets)


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
    """Mean entropy of the teacher's answers as a fraction of log K, at temperature 1 and at each one of the loss."""
    from kd.losses.numerics import standardise

    found = {}
    for name, (t, scaled) in {"1": (1.0, False), **soft_temperatures(terms)}.items():
        log_p = ((standardise(logits) if scaled else logits).double() / t).log_softmax(1)  # (N, K)
        found[name] = (-(log_p.exp() * log_p).sum(1).mean() / torch.tensor(float(logits.shape[1])).log()).item()
    return found


def temperatures(figures: Mapping[str, float]) -> list[Finding]:
    """A temperature at which the teacher says nothing beyond the label, or nothing at all, deserves a word."""
    found = []
    for name, value in figures.items():
        _, _, rest = name.partition("entropy/")
        term, _, t = rest.partition("/")
        if not t or 0.01 <= value <= 0.995:
            continue
        state = "almost uniform" if value > 0.5 else "almost one-hot"
        better = f"{float(t) / 2:g}" if value > 0.5 else f"{2 * float(t):g}"
        found.append(
            Finding(
                "temperature",
                f"at temperature {t} of the term {term} the teacher's answers are {state} (entropy {percent(value)} of the most)",
                f"Try loss.{term}.temperature={better}",
                stops=False,
            )
        )
    return found


def parts(loaded: Any) -> list[tuple[str, nn.Module, nn.Module, str | None]]:
    """(what to call it, frozen classifier, original, digest of its own data) of a teacher or of an ensemble's members."""
    if not isinstance(loaded.classifier, Ensemble):
        return [("the teacher", loaded.classifier, loaded.original, loaded.digest)]
    frozen = loaded.classifier.members
    return [
        (f"member {i + 1} of the ensemble", f, m.original, m.digest)
        for i, (f, m) in enumerate(zip(frozen, loaded.members))
    ]


def compare_paths(loaded: Any, split: Any, device: str, half: bool) -> tuple[dict[str, float], list[Finding]]:
    """Top-1 and probabilities through the distillation path (frozen, folded, bf16) and of the model itself (float32)."""
    few = spread(split, PARITY)
    own = metrics.logits_of(lambda x: loaded.original.to(device)(x).logits, few, device)
    path = metrics.logits_of(lambda x: loaded.classifier(x).logits, few, device, half)
    tops = [(x.argmax(1) == few.targets).double().mean().item() for x in (own, path)]
    moved = (own.softmax(1) - path.softmax(1)).abs().sum(1).mean().item() / 2  # total variation
    figures = {"own/top1": tops[0], "path/top1": tops[1], "path/distance": moved}
    if moved <= LOST and abs(tops[0] - tops[1]) <= max(LOST, 2 / len(few)):
        return figures, []
    text = f"the teacher has a top-1 of {percent(tops[0])} by itself and {percent(tops[1])} through the path it teaches by "
    text += f"({len(few)} images; probabilities differ by {moved:.3f} in the mean)"
    fix = "Type recipe.precision=fp32" if half else "Batch norm cannot be folded into this network; please report it"
    return figures, [Finding("path", text, fix)]


def frozen(classifier: nn.Module) -> list[Finding]:
    """The teacher is in eval mode and has no gradient."""
    if any(m.training for m in classifier.modules()) or any(p.requires_grad for p in classifier.parameters()):
        return [
            Finding("path", "the teacher is not frozen: it is in training mode or has gradients", "Please report it")
        ]
    return []


def causes(loaded: Any, dataset: Any, split: Any, logits: Tensor, cfg: Any, device: str, half: bool) -> list[Finding]:
    """What is wrong with weights from elsewhere, or on data that they were not trained on: one finding a network."""
    found = []
    for who, network, _, digest in parts(loaded):
        if digest is not None and digest == dataset.digest:
            continue  # trained by kd on these very images: its preprocessing, classes and head are its own
        if network is not loaded.classifier:
            logits = metrics.logits_of(lambda x, m=network: m(x).logits, split, device, half)
        finding = cause(who, network, split, logits, dataset.classes, cfg, device, half)
        found += [finding] if finding else []
    return found


def cause(
    who: str, network: nn.Module, split: Any, logits: Tensor, classes: list[str], cfg: Any, device: str, half: bool
) -> Finding | None:
    """The order of classes, else the preprocessing, else the head: the first of them that explains what is missing."""
    right = logits.argmax(1) == split.targets
    top1 = right.double().mean().item()
    if top1 >= GOOD:
        return None

    def rightly(part: Any) -> Tensor:
        return metrics.logits_of(lambda x: network(x).logits, part, device, half).argmax(1) == part.targets

    known = Known(network, split, len(classes), device, half)
    if (order := suspects.other_order(logits, split.targets)) and order[1] >= 0.7 * known.top1:
        return wrong_order(who, order, logits, split.targets, top1, classes)
    if reading := suspects.other_reading(network, split, rightly):
        return wrong_reading(who, reading, network)
    if top1 < 0.5 and known.better_than(right):
        return wrong_head(who, top1, known.top1, logits)
    return None


class Known:
    """What a linear layer on the teacher's penultimate features would attain, computed when it is first asked for."""

    def __init__(self, network: nn.Module, split: Any, num_classes: int, device: str, half: bool):
        self.network, self.split, self.num_classes, self.device, self.half = network, split, num_classes, device, half
        self.places = spread(split, suspects.MOST)
        self._right: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """Bool, for the images of `places`; none is right where the network has no penultimate features."""
        if self._right is None:
            if self.network.head is None:
                self._right = torch.zeros(len(self.places), dtype=torch.bool)
            else:
                features = metrics.logits_of(self._ask, self.places, self.device, self.half)
                self._right = suspects.probe(features, self.places.targets, self.num_classes)
        return self._right

    def _ask(self, images: Tensor) -> Tensor:
        return self.network(images, ["penultimate"]).features["penultimate"]

    @property
    def top1(self) -> float:
        """The share that is right."""
        return self.right.double().mean().item()

    def better_than(self, right: Tensor) -> bool:
        """Whether the features know at least twice as much as the logits (`right`, over the whole split) say."""
        same = (
            right
            if len(right) == len(self.right)
            else right[torch.linspace(0, len(right) - 1, len(self.right)).round().long()]
        )
        return self.top1 > 2 * same.double().mean().item() and suspects.surely_better(self.right, same)


def wrong_order(
    who: str, found: tuple[Tensor, float], logits: Tensor, targets: Tensor, top1: float, classes: list[str]
) -> Finding:
    """Outputs that speak for other classes than their place says."""
    from kd.teacher import typed_classes

    order, then = found
    names = list(classes)  # of the outputs, in their order
    for place, output in enumerate(order.tolist()):
        names[output] = classes[place]
    moved = [f"'{names[o]}' under '{classes[o]}'" for o in range(len(classes)) if names[o] != classes[o]]
    return Finding(
        "class_order",
        f"{who} has its classes in another order than the data: {percent(top1)} right as it is, {percent(then)} with its "
        f"outputs renamed; it answers {some(moved, 4)}",
        "Where class folders carry each other's names, rename them; where the weights have another order, type "
        f"{typed_classes(names)}",
    )


def wrong_reading(who: str, found: tuple[suspects.Reading, float, float], network: nn.Module) -> Finding:
    """Weights that were trained on otherwise prepared images."""
    reading, then, now = found
    text = f"{who} has not the preprocessing of its weights: {percent(now)} right as it is, {percent(then)} with {reading.name}"
    if not reading.swapped:
        return Finding("preprocessing", text, f"Type {reading.typed()}")
    first = next((n for n, m in network.network.named_modules() if isinstance(m, nn.Conv2d)), "conv1")
    return Finding(
        "preprocessing",
        text,
        "Turn the first layer's channels once: python -c \"from safetensors.torch import load_file as l, save_file as s; "
        f"w = l('PATH'); w['{first}.weight'] = w['{first}.weight'].flip(1).contiguous(); s(w, 'rgb.safetensors')\", then type "
        "teacher.checkpoint=rgb.safetensors",
    )


def wrong_head(who: str, top1: float, known: float, logits: Tensor) -> Finding:
    """Features that tell the classes apart under logits that do not: a head that never saw this data."""
    classes = logits.shape[1]
    log_p = logits.double().log_softmax(1)
    share = (-(log_p.exp() * log_p).sum(1).mean() / torch.tensor(float(classes)).log()).item()
    text = f"{who} is right on {percent(top1)} of the images, chance is {percent(1 / classes)}, while its penultimate features tell "
    text += f"{percent(known)} of them apart: "
    if share > 0.7:  # a head as it was initialised says nearly the same of every image
        text += f"its head is random (its answers are almost uniform, entropy {percent(share)} of the most)"
        code = "random_head"
    else:
        text += f"it is a teacher of another dataset, or its head is random (it is sure of itself, entropy {percent(share)} of the most)"
        code = "other_dataset"
    fix = "Give weights that were trained on this dataset, head included (teacher.checkpoint=PATH), or teacher.checkpoint=auto to "
    return Finding(code, text, fix + "fine-tune it first")


_KEPT: dict[tuple, tuple[dict[str, Any], list[Finding]]] = {}


def once(key: tuple, look: Callable[[], tuple[dict[str, Any], list[Finding]]]) -> tuple[dict[str, Any], list[Finding]]:
    """The same teacher under the same conditions is looked at once in a process: a sweep has many students for it."""
    if key not in _KEPT:
        _KEPT[key] = look()
    return _KEPT[key]


__all__ = ["UserError", "diagnose", "once"]
