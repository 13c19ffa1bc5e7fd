"""The tables of docs/models.md: every preset, and forty further networks of timm, at 32 and at 64 pixels.

    python scripts/models_table.py            # writes the part of docs/models.md below its marker; some minutes

Each network is built with real weights, run forward and its stages read; where that fails the row says why.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from kd.models import build, catalogue

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
MARKER = "<!-- below: python scripts/models_table.py -->"
SIZES = (32, 64)
FURTHER = {
    "ResNet and kin": ["resnet26d", "seresnet18", "resnetv2_50", "res2net50_26w_4s", "nf_resnet26"],
    "DenseNet, DLA, HRNet": ["densenet169", "dla34", "hrnet_w18_small"],
    "VGG, RepVGG": ["vgg11_bn", "repvgg_a0"],
    "RegNet": ["regnety_002", "regnetx_004"],
    "EfficientNet and kin": ["efficientnet_lite0", "tf_efficientnetv2_b0", "mnasnet_050", "rexnet_100", "tinynet_e"],
    "Mobile": ["hgnetv2_b0", "repvit_m0_9", "starnet_s1", "mobilevitv2_050", "efficientvit_b0"],
    "ViT and kin": ["vit_medium_patch16_gap_240", "beit_base_patch16_224", "cait_xxs24_224"],
    "Pooling ViT": ["pit_ti_distilled_224", "levit_128s", "pvt_v2_b0", "tiny_vit_5m_224"],
    "Cross-covariance, class attention": ["xcit_nano_12_p16_224", "volo_d1_224"],
    "Swin and kin": ["swinv2_tiny_window8_256", "twins_svt_small", "davit_tiny"],
    "MetaFormer": ["poolformer_s12", "caformer_s18"],
    "ConvNeXt and kin": ["convnextv2_atto", "inception_next_tiny", "edgenext_xx_small"],
    "MaxViT, CoAtNet": ["coatnet_rmlp_nano_rw_224", "maxvit_tiny_tf_224"],
    "MLP": ["gmixer_24_224", "sequencer2d_s"],
    "Others": ["convmixer_768_32", "mambaout_femto", "inception_v3", "efficientformer_l1", "visformer_tiny"],
}


def rows(specs: Iterable[tuple[str, str, dict]]) -> Iterator[str]:
    """Lines of a table: name, group, parameters, and for each size MACs and stages, or why not."""
    for name, group, spec in specs:
        found = [tried(name, spec, size) for size in SIZES]
        counts = [f"{r['parameters']:,}" for r in found if r["parameters"]]
        print(name, [r["reason"] or "four stages" for r in found], file=sys.stderr, flush=True)
        yield f"| {name} | {group} | {counts[0] if counts else '-'} | {' | '.join(cell(r) for r in found)} |"


def tried(name: str, spec: dict, size: int) -> dict:
    """A row of the catalogue, after a real forward of two images with every feature that the network says it has."""
    try:
        model = build(spec, 100, size).eval()
        with torch.inference_mode():
            model(torch.rand(2, 3, size, size), model.taps.names)
    except ValueError as error:
        return {"parameters": None, "reason": str(error).split(". Feed it")[0]}
    return catalogue.describe(name, spec, 100, size)


def cell(row: dict) -> str:
    """MACs and the stages of one size, or the reason."""
    if not row["parameters"]:
        return row["reason"].replace("|", "/")
    stages = " ".join(f"{c}x{h}" for c, h, _ in row["stages"].values())
    return f"{row['macs'] / 1e6:,.1f} M: {stages}" + (f" ({row['reason']})" if row["reason"] else "")


def table(title: str, specs: Iterable[tuple[str, str, dict]]) -> str:
    """A heading and a table."""
    head = f"| name | family | parameters | {' | '.join(f'MACs and stages at {s}' for s in SIZES)} |"
    return "\n".join([f"## {title}", "", head, "| --- | --- | ---: | --- | --- |", *rows(specs), ""])


def main() -> None:
    """Rewrite the page below its marker."""
    warnings.filterwarnings("ignore")
    ours = [(n, s["family"], s) for n, s in catalogue.presets().items()]
    further = [(n, group, {"name": n}) for group, names in FURTHER.items() for n in names]
    text = "\n".join([table("Presets", ours), table("Further networks of timm", further)])
    kept = PAGE.read_text(encoding="utf-8").split(MARKER)[0]
    PAGE.write_text(f"{kept}{MARKER}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
