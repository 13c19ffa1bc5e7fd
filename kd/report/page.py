"""A report as text on the console, Markdown, CSV, and one HTML page that opens without network."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from kd import files
from kd.report.pieces import Section, Table
from kd.report.rows import Gathered

TEMPLATE = Path(__file__).with_name("page.html")


def to_console(sections: Sequence[Section]) -> None:
    """Sentences and tables, as wide as the terminal."""
    import os

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(width=None if os.isatty(1) else 160, highlight=False)
    for section in sections:
        console.print(f"\n[bold]{escape(section.title)}[/bold]")
        for sentence in section.sentences:
            console.print(escape(sentence))
        for table in section.tables:
            shown = RichTable(
                title=table.title or None, title_justify="left", caption=table.note or None, caption_justify="left"
            )
            for at, column in enumerate(table.columns):
                shown.add_column(escape(column), justify="right" if numeric(table, at) else "left", overflow="fold")
            for at, row in enumerate(table.rows):
                shown.add_row(*map(escape, row), style="dim" if at in table.greyed else None)
            console.print(shown)
        for command in section.commands:
            console.print(f"  {escape(command)}", soft_wrap=True)


def numeric(table: Table, column: int) -> bool:
    """Whether a column's cells are numbers, which go to the right."""
    cells = [row[column] for row in table.rows if row[column]]
    return bool(cells) and all(c.lstrip("+-[<− ")[:1].isdigit() for c in cells)


def to_markdown(sections: Sequence[Section], heading: str, folder: Path) -> str:
    """The whole report; pictures by their place beside it."""
    parts = [f"# {heading}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.sentences
        parts += [f"![{f.caption}]({f.png.relative_to(folder).as_posix()})" for f in section.figures]
        parts += [_markdown_table(t) for t in section.tables]
        parts += ["```\n" + "\n".join(section.commands) + "\n```"] if section.commands else []
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = ["---:" if numeric(table, at) else "---" for at in range(len(table.columns))]
    rows = [[f"*{c}*" if c and at in table.greyed else c for c in row] for at, row in enumerate(table.rows)]
    text = "\n".join([line(table.columns), line(rule), *map(line, rows)])
    title = f"**{table.title}**\n\n" if table.title else ""
    return f"{title}{text}" + (f"\n\n{table.note}" if table.note else "")


def to_html(sections: Sequence[Section], heading: str) -> str:
    """One page with styles and pictures inside it."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data"] = lambda path: (
        "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(sections=sections, heading=heading, numeric=numeric)


def to_csv(gathered: Gathered) -> str:
    """One line a run: names, seed, budget, every metric and figure."""
    rows = [r for c in gathered.cells for r in c.rows]
    metrics = sorted({n for r in rows for n in r.metrics})
    costs = sorted({n for r in rows for n in (r.run.record.get("efficiency") or {})})
    fixed = [
        "run",
        "dataset",
        "student",
        "family",
        "teacher",
        "teacher_family",
        "method",
        "seed",
        "budget",
        "selected_on",
        "sweep",
    ]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow([*fixed, *metrics, *(f"efficiency/{n}" for n in costs), "seconds"])
    for r in rows:
        record = r.run.record
        named = [
            r.run.name,
            r.dataset,
            r.student,
            r.family,
            r.teacher,
            r.teacher_family or "",
            r.method,
            r.seed,
            r.budget,
        ]
        named += ["val" if r.honest else "test", record.get("sweep") or ""]
        values = [r.metrics.get(n, "") for n in metrics] + [(record.get("efficiency") or {}).get(n, "") for n in costs]
        table.writerow([*named, *values, round(sum((record.get("seconds") or {}).values()), 2)])
    return written.getvalue()


def write(sections: Sequence[Section], gathered: Gathered, folder: Path, heading: str) -> list[Path]:
    """report.md, results.csv and report.html."""
    texts = {
        "report.md": to_markdown(sections, heading, folder),
        "results.csv": to_csv(gathered),
        "report.html": to_html(sections, heading),
    }
    for name, text in texts.items():
        files.write_text(folder / name, text)
    return [folder / n for n in texts]
