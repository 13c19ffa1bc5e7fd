"""Whether an exported file answers as the classifier that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd.hints import UserError

if TYPE_CHECKING:
    from kd.config import ExportConfig

BATCH = 64


@torch.inference_mode()
def compare(classifier: Any, ask: Callable[[Tensor], Tensor], split: Any) -> dict[str, Any]:
    """Largest logit difference, both top-1, and how many predictions changed, over a split."""
    ours, theirs = [], []
    classifier = classifier.cpu().float().eval()
    for batch in split.batches(BATCH):
        images = batch.images.contiguous()
        ours.append(classifier(images).logits)
        theirs.append(ask(images))
    before, after, targets = torch.cat(ours), torch.cat(theirs), split.targets
    top1 = [(logits.argmax(1) == targets).double().mean().item() for logits in (before, after)]
    return {
        "images": len(targets),
        "max_logit_difference": (before - after).abs().max().item(),
        "top1": top1[0],
        "top1_exported": top1[1],
        "top1_drop": top1[0] - top1[1],
        "changed": int((before.argmax(1) != after.argmax(1)).sum()),
    }


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
    if cfg.quantize != "int8" and not far <= cfg.tolerance:  # NaN fails too
        raise UserError(
            f"the exported file's logits differ by {far:.2e}, more than tolerance={cfg.tolerance:g}: it was not kept. "
            f"tolerance={2 * far:.0e} would accept it"
        )
    if not found["top1_drop"] <= cfg.max_drop:
        raise UserError(
            f"the exported file loses {100 * found['top1_drop']:.2f} points of top-1, more than "
            f"max_drop={cfg.max_drop:g}: it was not kept. max_drop={found['top1_drop'] + 0.005:.2f} would accept it"
            + (", calibration=N calibrates on more images" if cfg.quantize == "int8" else "")
        )
