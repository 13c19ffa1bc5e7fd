"""Every pair of five families, each way, with five losses: one epoch of each on digits, as a table.

    python scripts/pairs_table.py runs_dir=runs/pairs out=docs/pairs.md       125 runs, some ten minutes on two cores
    python scripts/pairs_table.py losses=kd,ofa models=resnet8,vit_micro      some of them

A combination runs, or is refused before its first step; anything else makes the script end with exit code 1.
"""

from __future__ import annotations

import sys
import time
from itertools import product
from pathlib import Path

MODELS = ("resnet8", "mobilenet_micro", "swin_micro", "vit_micro", "mixer_micro")  # cnn, mobile, hybrid, vit, mlp
LOSSES = ("kd", "fitnet", "at", "rkd", "ofa")
SETTINGS = ("recipe.epochs=1", "teacher.recipe.epochs=1", "teacher.min_top1=0", "tracker=none", "baseline=off")


def main() -> int:
    """Run them and write the table; gives the exit code."""
    typed = dict(a.split("=", 1) for a in sys.argv[1:])
    models = typed.pop("models", ",".join(MODELS)).split(",")
    losses = typed.pop("losses", ",".join(LOSSES)).split(",")
    out = Path(typed.pop("out", "pairs.md"))
    overrides = [*SETTINGS, *(f"{k}={v}" for k, v in {"runs_dir": "runs/pairs", **typed}.items())]
    found, started = {}, time.perf_counter()
    for teacher, student, loss in product(models, models, losses):
        found[teacher, student, loss] = outcome = attempt(teacher, student, loss, overrides)
        print(f"{len(found):3} {teacher} -> {student}, {loss}: {outcome}", flush=True)
    out.write_text(table(found, models, losses), encoding="utf-8")
    broken = [key for key, outcome in found.items() if outcome.startswith("broken")]
    print(f"{len(found)} combinations, {len(broken)} broken, {time.perf_counter() - started:.0f} s: {out}")
    return 1 if broken else 0


def attempt(teacher: str, student: str, loss: str, overrides: list[str]) -> str:
    """`runs`, or `refused: REASON` where no step was made, or `broken: ERROR`."""
    from kd import compose, run, runs
    from kd.hints import UserError

    cfg = compose(f"teacher={teacher}", f"student={student}", f"loss={loss}", *overrides)
    try:
        done = run(cfg, say=lambda _: None)
        return "runs" if done.done else f"broken: {done.status}"
    except (UserError, ValueError) as error:
        stepped = any((r.folder / "checkpoints").exists() for r in runs.records(cfg.runs_dir) if not r.done)
        return f"{'broken' if stepped else 'refused'}: {error}"
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}"


def table(found: dict[tuple[str, str, str], str], models: list[str], losses: list[str]) -> str:
    """One row for each pair, one column for each loss; reasons below."""
    reasons = list(dict.fromkeys(o for o in found.values() if o != "runs"))
    lines = [
        "# Every family with every family",
        "",
        f"`python scripts/pairs_table.py`: {len(found)} combinations of teacher, student and loss, one epoch of digits at 16 "
        f"pixels each; {sum(o == 'runs' for o in found.values())} run"
        + (f", {sum(o != 'runs' for o in found.values())} are refused before the first step." if reasons else "."),
        "",
        "| teacher -> student | " + " | ".join(losses) + " |",
        "| --- | " + " | ".join("---" for _ in losses) + " |",
    ]
    for teacher, student in product(models, models):
        outcomes = [found[teacher, student, loss] for loss in losses]
        cells = ["runs" if o == "runs" else f"no [{reasons.index(o) + 1}]" for o in outcomes]
        lines.append(f"| {teacher} -> {student} | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1))]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
