"""`python -m kd.models`: what networks there are, and what they cost at a given size."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HELP = """examples:
  python -m kd.models                              every preset: family, parameters, MACs, stages at 32 pixels
  python -m kd.models resnet20 vit_b --size 16     some of them, or any of timm's names
  python -m kd.models --search 'vit*'              timm's networks, and the hub weights that there are
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m kd.models", description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("names", nargs="*", help="presets or timm names; all presets by default")
    made.add_argument("--classes", type=int, default=100, help="width of the head (100)")
    made.add_argument("--size", type=int, default=32, help="pixels of an image's side (32)")
    made.add_argument("--config-dir", type=Path, help="a folder of your own with model/*.yaml")
    made.add_argument("--search", metavar="PATTERN", help="search timm's networks, such as 'vit*'")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects with name, family, parameters, macs, ...")
    form.add_argument("--markdown", action="store_true", help="the table of docs/models.md")
    return made


def main(argv: list[str] | None = None) -> int:
    """Print the catalogue; 2 for names that nobody knows."""
    args = parser().parse_args(argv)
    if args.classes < 1 or args.size < 1:
        return complain(f"--classes {args.classes} --size {args.size}: expected numbers above 0")
    warnings.filterwarnings("ignore")
    from kd.models import catalogue

    catalogue.also(args.config_dir)
    if args.search:
        return show_search(catalogue.search(args.search), args)
    try:
        check_names(args.names, catalogue)
    except (KeyError, ValueError) as error:
        return complain(str(error.args[0]))
    rows = catalogue.survey(args.names or None, args.classes, args.size)
    if args.json:
        print(json.dumps(list(rows), indent=1))
    else:
        show(rows, args)
    return 0


def complain(message: str) -> int:
    """One line on stderr, and the exit code of a usage error."""
    print(message, file=sys.stderr)
    return 2


def check_names(names: Iterable[str], catalogue) -> None:
    """Raises for a name that is neither a preset nor timm's."""
    known = catalogue.presets()
    for name in names:
        if name not in known:
            from kd.models.sizing import check_name

            check_name(name)


def show_search(found: list[dict], args: argparse.Namespace) -> int:
    """timm's networks, one a line."""
    if args.json:
        print(json.dumps(found, indent=1))
    elif not found:
        return complain(f"no network of timm matches '{args.search}'")
    for row in [] if args.json else found:
        print(f"{row['name']:44} {', '.join(row['weights']) or 'no hub weights'}")
    return 0


def show(rows: Iterable[dict[str, Any]], args: argparse.Namespace) -> None:
    """A table, each row as soon as it is known."""
    columns = ("preset", "family", "network", "parameters", "MMACs", "stages (channels x side)")
    if args.markdown:
        print(f"At {args.size}x{args.size} pixels with {args.classes} classes.\n")
        print(f"| {' | '.join(columns)} |\n| --- | --- | --- | ---: | ---: | --- |")
    else:
        print(line(columns))
    for row in rows:
        print(f"| {' | '.join(cells(row))} |" if args.markdown else line(cells(row)), flush=True)


def line(values: Iterable[str]) -> str:
    """One row of the plain table."""
    widths = (22, 7, 32, 12, 9, 0)
    return "  ".join(
        f"{v:>{w}}" if i in (3, 4) else f"{v:{w}}" for i, (v, w) in enumerate(zip(values, widths, strict=True))
    )


def cells(row: dict[str, Any]) -> list[str]:
    """A row's texts."""
    stages = " · ".join(f"{c}x{h}" if h == w else f"{c}x{h}x{w}" for c, h, w in row["stages"].values())
    notes = ", ".join(t for t in (stages, row["reason"]) if t)
    figures = ["-", "-"] if row["parameters"] is None else [f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f}"]
    return [row["name"], row["family"], row["network"], *figures, notes]


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
