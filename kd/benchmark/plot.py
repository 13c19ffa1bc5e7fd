"""The benchmark's figures as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#4d4d4d", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")  # Okabe, Ito 2008


def draw(figures: dict[str, Any], path: Path) -> Path:
    """Latency of one image with its tail, and images/s over the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = figures["cells"]
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(14, 2.6 + 0.35 * max(4, len(rows))), layout="constrained")
    for at, row in enumerate(rows):
        colour, latency = COLOURS[at % len(COLOURS)], row["latency_ms"]
        bars.plot(latency["p50"], at, "o", color=colour, markersize=9)
        bars.plot(
            [latency["p95"], latency["p99"]],
            [at, at],
            "|-",
            color="black",
            markersize=9,
            label="p95, p99" if not at else None,
        )
        bars.text(latency["p99"] * 1.08, at, f"{latency['p50']:.2f} ms", va="center")
        sizes = [int(s) for s in row["images_per_s"]]
        rates = [c["images_per_s"] for c in row["images_per_s"].values()]
        curves.plot(sizes, rates, "o-", color=colour, label=row["name"])
        curves.fill_between(
            sizes, *([c[k] for c in row["images_per_s"].values()] for k in ("low", "high")), color=colour, alpha=0.2
        )
    _label(bars, curves, rows, figures["environment"], figure)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _label(bars: Any, curves: Any, rows: list[dict[str, Any]], where: dict[str, Any], figure: Any) -> None:
    bars.set_yticks(range(len(rows)), [r["name"].replace(", ", "\n") for r in rows])
    bars.invert_yaxis()
    bars.set_xscale("log")
    tails = [r["latency_ms"]["p99"] for r in rows]
    bars.set_xlim(0.5 * min(r["latency_ms"]["p50"] for r in rows), 3 * max(tails))
    bars.set_xlabel("latency of one image (ms, log scale; dot: median)")
    bars.grid(axis="x", alpha=0.3)
    bars.legend(loc="lower right")
    curves.set_xscale("log", base=2)
    curves.set_yscale("log")
    curves.set_xlabel("batch size")
    curves.set_ylabel("images/s (band: 95 % interval)")
    sizes = [int(s) for s in rows[0]["images_per_s"]]
    curves.set_xticks(sizes, sizes)
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        f"{where['device_name']}, {where['threads']} thread(s), torch {where['torch']}; preprocessing counted in"
    )
