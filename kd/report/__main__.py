"""What all the runs of a runs_dir say: console tables, report.md, results.csv, plots and one HTML page.

python -m kd.report                          everything below runs/, written to runs/report/
python -m kd.report sweep=NAME               the runs of one sweep or search, with their teachers
python -m kd.report runs_dir=DIR out=DIR     another place to read, another to write
python -m kd.report wandb=[ENTITY/]PROJECT   also to W&B: plots, results, the page (offline without a key)
python -m kd.report speed=off                no stopwatch: accuracy only (speed=on times each network for 2 s, once)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from kd.hints import ConfigError, did_you_mean


@dataclass
class Settings:
    """What can be typed as KEY=VALUE."""

    runs_dir: str = "runs"
    sweep: str | None = None
    out: str | None = None  # null: runs_dir/report
    wandb: str | None = None  # a W&B project to send it to
    speed: str = "on"
    trust: bool = False  # time networks whose classes are not kd's
    threads: int | None = None


def main() -> None:
    """`python -m kd.report` and `kd-report`."""
    from kd import cli

    if {"-h", "--help"} & set(sys.argv[1:]):
        return print(__doc__.strip())
    try:
        report(parse(sys.argv[1:]))
    except Exception as error:
        sys.exit(cli.report(error))
    except KeyboardInterrupt:
        sys.exit(130)


def parse(arguments: list[str]) -> Settings:
    """Settings from KEY=VALUE; ConfigError for anything else."""
    settings, known = Settings(), tuple(Settings.__annotations__)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in known or not equals:
            raise ConfigError(
                f"'{argument}': expected KEY=VALUE with one of {', '.join(known)}.{did_you_mean(key, known)}"
            )
        setattr(settings, key, None if value in ("", "null") else value)
    if settings.speed not in ("on", "off"):
        raise ConfigError(f"speed={settings.speed}: expected on or off")
    if settings.trust not in (False, "true", "false"):
        raise ConfigError(f"trust={settings.trust}: expected true or false")
    settings.trust = settings.trust == "true"
    if settings.threads is not None:
        if not str(settings.threads).isdigit() or int(settings.threads) < 1:
            raise ConfigError(f"threads={settings.threads}: expected a whole number above 0")
        settings.threads = int(settings.threads)
    settings.runs_dir = settings.runs_dir or "runs"
    return settings


def report(settings: Settings) -> Path:
    """Write the report and print it; gives the HTML page's path."""
    from kd.hints import UserError
    from kd.report import behaviour, cross, efficiency, gaps, page, quality, results, trials
    from kd.report.rows import gather

    gathered = gather(Path(settings.runs_dir), settings.sweep)
    folder = Path(settings.out) if settings.out else gathered.runs_dir / "report"
    plots = folder / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Type out=ANOTHER_FOLDER") from error
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)
    sections = [
        *quality.sections(gathered, plots),
        *cross.sections(gathered, plots),
        *efficiency.sections(gathered, plots, measure=settings.speed == "on", trust=settings.trust),
        *behaviour.sections(gathered, plots),
        *trials.sections(gathered, plots),
        *results.sections(gathered),
        *gaps.sections(gathered),
    ]
    heading = f"Distillation report: {settings.sweep}" if settings.sweep else "Distillation report"
    written = page.write(sections, gathered, folder, heading)
    page.to_console(sections)
    print("\nwritten: " + ", ".join(map(str, written)) + f" and {len(list(plots.glob('*.png')))} plots in {plots}")
    if settings.wandb:
        from kd.report.send import send

        print(send(folder, sorted(plots.glob("*.png")), settings.wandb, settings.sweep))
    return written[-1]


if __name__ == "__main__":
    main()
