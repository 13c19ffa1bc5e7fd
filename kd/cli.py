"""The command line of the entry points that compose a configuration: overrides in, exit code out."""

from __future__ import annotations

import importlib
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.config import GROUPS, ROLES, Config, conf_dir, register, rewrite, setting_keys, settle
from kd.hints import Interrupted, UserError, did_you_mean

SETTINGS = """\
Settings (KEY=VALUE)
  seed runs_dir fresh dry device threads baseline
  recipe.{epochs,steps,minutes,batch_size,lr,weight_decay,keep_epochs,...}
  teacher.{checkpoint,epoch,seed,recipe,min_top1,...}
  dataset.{root,image_size,train_fraction,val_fraction,split_seed,...}
  all of them, as composed: --cfg job"""


def entry(config_name: str, job: Callable[[Config], Any], about: str) -> None:
    """Compose `config_name` with the overrides in sys.argv and call `job`; a user's mistake ends with a message, not a traceback.

    `about` heads `--help`.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        return show(help_text(about, _config_dirs(sys.argv[1:])))
    import hydra

    if config_name in ("evaluate", "benchmark", "export"):  # a path alone is the run
        sys.argv[1:] = [f"run={a}" if "=" not in a and (Path(a) / "run.json").is_file() else a for a in sys.argv[1:]]
    sys.argv[1:] = options_first([rewrite(a) for a in sys.argv[1:]])
    register(_config_dirs(sys.argv[1:]))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are
    terminable()

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(Task(job))()
    except Exception as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


def show(text: str) -> None:
    """Print it; a reader that has seen enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def options_first(arguments: list[str]) -> list[str]:
    """The options that take a value before everything else: Hydra's parser loses overrides on both sides of one."""
    first, rest = [], list(arguments)
    for name in ("--config-dir", "-cd", "--package", "-p", "--cfg", "-c"):
        while name in rest[:-1]:
            at = rest.index(name)
            first += rest[at : at + 2]
            del rest[at : at + 2]
    return [*first, *rest]


def help_text(about: str, config_dirs: list[Path]) -> str:
    """What `--help` prints. Hydra's own would take seconds: it copies the whole store for every group."""
    lines = []
    for group in GROUPS:
        found = {p.stem for folder in (conf_dir(), *config_dirs) for p in (folder / group).glob("*.yaml")}
        if group in ROLES:
            found |= {p.stem for folder in (conf_dir(), *config_dirs) for p in (folder / "model").glob("*.yaml")}
        if found:
            sign = "+" if group in ("experiment", "sweep", "search") else ""
            lines += textwrap.wrap(
                f"{sign}{group}= {', '.join(sorted(found))}", 118, initial_indent="  ", subsequent_indent="      "
            )
    return "\n".join([about.strip(), "", "Choices (GROUP=NAME)", *lines, "", SETTINGS])


class Task:
    """One job of Hydra, known by name: a launcher's processes import it, and `python -m` has one copy of its module, not two.

    A job of a multirun raises; a single run, or a signal, ends the process with its own exit code.
    """

    def __init__(self, job: Callable[[Config], Any]):
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        self.module = spec.name if job.__module__ == "__main__" and spec else job.__module__
        self.name, self.pid = job.__name__, os.getpid()

    def __call__(self, composed) -> Any:
        """Run the job on the settings that Hydra composed."""
        if os.getppid() == self.pid:
            _end_with(self.pid)
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_config = HydraConfig.get()
        single = hydra_config.mode == RunMode.RUN
        try:
            job = getattr(importlib.import_module(self.module), self.name)
            return job(settle(composed, list(hydra_config.overrides.task), strict=single))
        except Exception as error:
            if not single and not isinstance(error, Interrupted):
                raise
            sys.exit(report(error))


def _end_with(parent: int) -> None:
    """End this worker of a launcher when its sweep is killed: it would go on with what is queued, beside the next sweep."""
    if _WATCHED:
        return
    _WATCHED.append(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # as a kill would: what is written is whole

    threading.Thread(target=watch, daemon=True).start()


_WATCHED: list[int] = []


def report(error: Exception) -> int:
    """Print what went wrong in the user's words and give the exit code: 2 for usage, 1 otherwise."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if os.environ.get("KD_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, Interrupted):
        return _say(str(error), 128 + error.signum)
    if isinstance(error, UserError):
        return _say(str(error), error.exit_code)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _say(explain(error), 2)
    if isinstance(error, (ValueError, KeyError, OSError, NotImplementedError)):
        return _say(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error), 1)
    if not os.environ.get("KD_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    return 1


def _say(text: str, code: int) -> int:
    print(f"kd: {text}", file=sys.stderr, flush=True)
    return code


def explain(error: Exception) -> str:
    """Hydra's composition error with the near misses and what to type."""
    text = "\n".join(str(e) for e in _chain(error))
    if found := re.search(r"Could not override '(?:[\w/]+@)?([^']+)'", text):
        return _explain_key(found[1].strip(), text)
    if found := re.search(r"Key '([^']+)' not in '(\w+)'\s*\n?\s*full_key: (\S+)", text):
        return _explain_key(found[3], text)
    if found := re.search(
        r"Could not find '([\w/]+)/([^'/]+)'\s*\n+\s*Available options in '[^']+':\s*([^\n]+(?:\n\s+\S+)*)", text
    ):
        options = found[3].split()
        return (
            f"there is no {found[1]} '{found[2]}'.{did_you_mean(found[2], options)} Known: {', '.join(sorted(options))}"
        )
    if found := re.search(r"Could not load '([\w/]+)/([^'/]+)'", text):
        options = sorted(p.stem for p in (conf_dir() / found[1]).glob("*.yaml"))
        return f"there is no {found[1]} '{found[2]}'.{did_you_mean(found[2], options)} Known: {', '.join(options)}"
    if found := re.search(r"(Value '.*?' .*? could not be converted to .*?)\n\s*full_key: (\S+)", text):
        return f"{found[2]}: {found[1]}"
    return str(error).strip()


def _explain_key(key: str, text: str) -> str:
    place = re.search(r"In '([^']+)'", text)
    if "could not be converted" in text and (
        found := re.search(r"(Value '.*?' .*? could not be converted to \w+)", text)
    ):
        return f"{key}: {found[1]}"
    where = f" (in {place[1]}.yaml)" if place else ""
    return f"there is no setting '{key}'{where}.{did_you_mean(key, setting_keys())} All of them: python -m kd.train --cfg job"


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _config_dirs(arguments: list[str]) -> list[Path]:
    """The folders given as --config-dir DIR, -cd DIR or --config-dir=DIR, made absolute."""
    folders = []
    for at, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd") and at + 1 < len(arguments):
            folders.append(Path(arguments[at + 1]))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.split("=", 1)[1]))
    for folder in folders:
        if not folder.is_dir():
            sys.exit(_say(f"--config-dir {folder}: there is no such folder", 2))
    return folders


def terminable() -> None:
    """SIGTERM unwinds like Ctrl-C, so that records are written and locks released."""
    import signal

    def stop(signum, frame):
        raise Interrupted(signum)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
