"""Whether an exported file answers as the classifier that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd.hints import UserError

if TYPE_CHECKING:
    from kd.config import ExportConfig

BATCH = 64
ROUNDINGS = 4  # a float32 file may differ by so many times what float32 itself rounds off, where logits are large


@torch.inference_mode()
def compare(classifier: Any, ask: Callable[[Tensor], Tensor], split: Any) -> dict[str, Any]:
    """Largest logit difference, both top-1, and how many predictions changed, over a split."""
    ours, theirs = [], []
    classifier = classifier.cpu().float().eval()
    for batch in split.batches(BATCH):
        images = batch.images.contiguous()
        ours.append(classifier(images).logits)
        theirs.append(ask(images))
    rounding = rounding_of(classifier, split, torch.cat(ours))
    before, after, targets = torch.cat(ours), torch.cat(theirs), split.targets
    top1 = [(logits.argmax(1) == targets).double().mean().item() for logits in (before, after)]
    return {
        "images": len(targets),
        "max_logit_difference": (before - after).abs().max().item(),
        "rounding": rounding,
        "top1": top1[0],
        "top1_exported": top1[1],
        "top1_drop": top1[0] - top1[1],
        "changed": int((before.argmax(1) != after.argmax(1)).sum()),
    }


def rounding_of(classifier: Any, split: Any, logits: Tensor, count: int = 256) -> float:
    """How far the classifier's own float32 logits are from float64's: no file can be held to less."""
    exact = copy.deepcopy(classifier)
    exact.network.double()
    images = torch.cat([b.images for b in split.subset(torch.arange(min(count, len(split)))).batches(BATCH)])
    return (exact(images).logits - logits[: len(images)]).abs().max().item()


def in_words(found: dict[str, Any]) -> str:
    """One line for the screen."""
    return (
        f"on {found['images']} images logits differ by at most {found['max_logit_difference']:.1e}, "
        f"top-1 {100 * found['top1']:.2f} % -> {100 * found['top1_exported']:.2f} % "
        f"({found['changed']} predictions changed)"
    )


def require(found: dict[str, Any], cfg: ExportConfig) -> None:
    """Raises UserError where the file answers too differently to be kept."""
    far = found["max_logit_difference"]
    allowed = max(cfg.tolerance, ROUNDINGS * found.get("rounding", 0.0))
    if cfg.quantize != "int8" and not far <= allowed:  # NaN fails too
        raise UserError(
            f"the exported file's logits differ by {far:.2e}, more than {allowed:.1e} (tolerance): it was not kept. "
            f"tolerance={2 * far:.0e} would accept it"
        )
    if not found["top1_drop"] <= cfg.max_drop:
        raise UserError(
            f"the exported file loses {100 * found['top1_drop']:.2f} points of top-1, more than "
            f"max_drop={cfg.max_drop:g}: it was not kept. max_drop={found['top1_drop'] + 0.005:.2f} would accept it"
            + (", calibration=N calibrates on more images" if cfg.quantize == "int8" else "")
        )
