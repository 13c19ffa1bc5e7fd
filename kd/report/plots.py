"""Pictures for a phone too: small, units on the axes, colours that the colour-blind tell apart (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.report.pieces import Figure

BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PINK, YELLOW, GRAY = "#56b4e9", "#cc79a7", "#f0e442", "#666666"
WIDTH = 5.0  # inches: at 400 pixels of page the letters are still legible
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "kd",  # the same data give the same file
}


@contextmanager
def canvas(
    folder: Path, name: str, caption: str, height: float = 3.6, width: float = WIDTH
) -> Iterator[tuple[Any, Any, list]]:
    """A figure with one pair of axes; on leaving it is saved as PNG and SVG, and a Figure appended to the list."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    saved: list[Figure] = []
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield figure, axes, saved
            folder.mkdir(parents=True, exist_ok=True)
            png, svg = folder / f"{name}.png", folder / f"{name}.svg"
            figure.savefig(png, dpi=160, metadata={"Software": None})
            figure.savefig(svg, metadata={"Date": None})
            saved.append(Figure(png, svg, caption))
        finally:
            plt.close(figure)


def label_points(axes: Any, points: list[tuple[float, float, str]], size: float = 8) -> None:
    """Write labels beside points, each at the first of some places where it covers no other label and no point."""
    from matplotlib.patheffects import withStroke

    figure, halo = axes.figure, [withStroke(linewidth=2.5, foreground="white")]
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [_box_around(axes, x, y) for x, y, _ in points]
    for x, y, text in sorted(points, key=lambda p: p[0]):
        options = []
        for dx, dy, across, down in PLACES:
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=across, va=down, fontsize=size, path_effects=halo
            )
            box = note.get_window_extent(renderer)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            options.append((sum(box.overlaps(b) for b in taken) + 3 * outside, len(options), note, box))
        _, _, chosen, box = min(options, key=lambda o: o[:2])
        for _, _, note, _ in options:
            if note is not chosen:
                note.remove()
        chosen.set_color("#333333")
        taken.append(box)


PLACES = [
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (6, 6, "left", "bottom"),
    (-6, 6, "right", "bottom"),
    (6, -6, "left", "top"),
    (-6, -6, "right", "top"),
    (14, 14, "left", "bottom"),
    (-14, 14, "right", "bottom"),
    (14, -14, "left", "top"),
    (-14, -14, "right", "top"),
]


def _box_around(axes: Any, x: float, y: float, half: float = 3.0) -> Any:
    from matplotlib.transforms import Bbox

    px, py = axes.transData.transform((x, y))
    return Bbox.from_extents(px - half, py - half, px + half, py + half)


def file_name(text: str) -> str:
    """A name for files from any text."""
    import re

    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80]
