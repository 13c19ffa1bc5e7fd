"""The benchmark's figures as tables on the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def show(figures: dict[str, Any], say: Callable[[str], None]) -> None:
    """The tables on the screen."""
    import sys

    from rich.console import Console
    from rich.table import Table

    where = figures["environment"]
    title = f"{where['device_name']}, {where['threads']} thread(s), torch {where['torch']}; preprocessing counted in"
    table = Table(title=title)
    head = (
        "",
        "mode",
        "parameters",
        "M MACs",
        "MiB",
        "latency ms p50",
        "p95",
        "p99",
        "of it preprocessing",
        "images/s",
        "peak MiB",
    )
    for column in head:
        table.add_column(column, justify="left" if column in ("", "mode") else "right")
    for row in figures["cells"]:
        table.add_row(*_cells(row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if figures["ratios"]:
        console.print(_ratio_table(figures))


def _cells(row: dict[str, Any]) -> list[str]:
    latency = row["latency_ms"]
    half = 100 * (latency["high"] - latency["low"]) / 2 / latency["median"]
    best, rate = max(row["images_per_s"].items(), key=lambda item: item[1]["images_per_s"])
    memory = ", ".join(f"{v:.0f} (batch {b})" for b, v in (row.get("peak_mib") or {}).items())
    return [
        row["model"],
        f"{row['mode']} {row['precision']}",
        f"{row['parameters']:,}",
        f"{row['macs'] / 1e6:,.1f}",
        f"{row['size_mib']:.2f}",
        f"{latency['p50']:.3f} ±{half:.1f} %",
        f"{latency['p95']:.3f}",
        f"{latency['p99']:.3f}",
        f"{row['preprocess_ms']['1']:.3f}" if "preprocess_ms" in row else "",
        f"{rate['images_per_s']:,.0f} (batch {best})",
        memory,
    ]


def _ratio_table(figures: dict[str, Any]) -> Any:
    from rich.table import Table

    size = figures["ratios"][0]["throughput_batch_size"]
    table = Table(title=f"times less than {figures['reference']} (95 % interval)")
    for column in ("", "latency", f"time of a batch of {size}", "memory", "parameters", "MACs", "size"):
        table.add_column(column, justify="right" if column else "left")
    for row in figures["ratios"]:
        timed = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (row["latency"], row["throughput"])]
        rest = [f"{row[k]:.1f}" if k in row else "" for k in ("peak_mib", "parameters", "macs", "size_mib")]
        table.add_row(row["name"], *timed, *rest)
    return table
