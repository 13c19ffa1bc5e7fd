"""Class names and probabilities for image files.

python -m kd.predict RUN photo.jpg folder/ --top 3
find . -name '*.png' | python -m kd.predict RUN - --json
python -m kd.predict RUN folder/ --teacher          the teacher's answer beside the student's
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.hints import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kd.saved import Saved


@dataclass
class Prediction:
    """What one image is taken for."""

    image: str
    top: list[tuple[str, float]]  # (class, probability), the likeliest first
    teacher: list[tuple[str, float]] | None = None

    def as_json(self) -> str:
        """One line."""
        line: dict[str, Any] = {"image": self.image, **_as_dict(self.top)}
        if self.teacher:
            line["teacher"] = _as_dict(self.teacher)
        return json.dumps(line, ensure_ascii=False)

    def as_text(self) -> str:
        """One line: path, tab, classes with percent."""
        columns = [self.image, _as_words(self.top)]
        return "\t".join([*columns, f"teacher: {_as_words(self.teacher)}"] if self.teacher else columns)


def _as_dict(top: list[tuple[str, float]]) -> dict[str, Any]:
    best, probability = top[0]
    return {"class": best, "probability": probability, "top": [{"class": c, "probability": p} for c, p in top]}


def _as_words(top: list[tuple[str, float]]) -> str:
    return ", ".join(f"{c} {100 * p:.1f} %" for c, p in top)


class Predictor:
    """A saved classifier, and its teacher if wanted, that answers for image files."""

    def __init__(self, saved: Saved, teacher: bool = False, top: int = 1, device: str = "auto", trust: bool = False):
        """Raises UserError where there is no teacher to ask."""
        from kd.device import pick_device
        from kd.saved import teacher_of

        self.device = pick_device(device)
        self.models: list[nn.Module] = [saved.load(trust).to(self.device)]
        if teacher:
            found = teacher_of(saved)
            if found is None:
                raise UserError(
                    f"--teacher: {saved.name} has no teacher, or its folder is gone. "
                    "Leave --teacher out, or name the teacher as RUN"
                )
            self.models.append(found.load(trust).to(self.device))
        first = self.models[0]
        self.size, self.channels = first.image_size, saved.channels or first.built["in_channels"]
        self.classes = first.classes or [str(k) for k in range(first.num_classes)]
        self.top = min(top, first.num_classes)

    def decode(self, path: str) -> Tensor:
        """Pixels as in training: uint8 (C, h, w). Raises BrokenImage or OSError."""
        from kd.data.decode import BrokenImage, decode

        if not Path(path).is_file():
            raise BrokenImage("a folder" if Path(path).is_dir() else "there is no such file")
        return decode(path, self.channels, self.size)

    def answer(self, images: Tensor) -> list[list[list[tuple[str, float]]]]:
        """For uint8 images (B, C, h, w): for each model, for each image its likeliest classes."""
        import torch

        with torch.inference_mode():
            return [self._likeliest(model(images.to(self.device)).logits.float().softmax(1)) for model in self.models]

    def _likeliest(self, probs: Tensor) -> list[list[tuple[str, float]]]:
        found = probs.topk(self.top, dim=1)  # (B, top)
        rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [[(self.classes[k], p) for k, p in zip(*row, strict=True)] for row in rows]

    def stream(self, paths: Iterable[str], batch_size: int = 64) -> Iterator[Prediction | UserError]:
        """A prediction for each path in order; in place of an image that cannot be read an error with its name."""
        import torch

        for chunk in _chunks(paths, batch_size):
            decoded = {path: self._try(path) for path in chunk}
            good = [p for p, d in decoded.items() if not isinstance(d, UserError)]
            answers = self.answer(torch.stack([decoded[p] for p in good])) if good else []
            by_path = {p: [a[i] for a in answers] for i, p in enumerate(good)}
            for path in chunk:
                yield Prediction(path, *by_path[path]) if path in by_path else decoded[path]

    def _try(self, path: str) -> Tensor | UserError:
        try:
            return self.decode(path)
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return UserError(f"{path}: {reason}")


def _chunks(paths: Iterable[str], size: int) -> Iterator[list[str]]:
    paths = iter(paths)
    while chunk := list(islice(paths, size)):
        yield chunk


def list_images(names: Iterable[str], stdin: Iterable[str]) -> Iterator[str]:
    """Files as they are, folders by the images below them in order, `-` by the paths that standard input lists."""
    from kd.data.sources import IMAGES

    for name in names:
        if name == "-":
            yield from (line.rstrip("\r\n") for line in stdin if line.strip())
        elif Path(name).is_dir():
            found = [p for p in Path(name).rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
            yield from sorted(map(str, found)) or [name]  # an empty folder is named as an error
        else:
            yield name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    about = argparse.ArgumentParser(prog="python -m kd.predict", description=__doc__, formatter_class=raw)
    about.add_argument(
        "run", metavar="RUN", help="a run directory, a saved model's folder, or wandb:ENTITY/PROJECT/NAME:ALIAS"
    )
    about.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for paths from standard input")
    about.add_argument("--top", type=int, default=1, metavar="K", help="the K likeliest classes (default 1)")
    about.add_argument("--json", action="store_true", help="JSON lines")
    about.add_argument("--teacher", action="store_true", help="the teacher's answer too")
    about.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    about.add_argument("--threads", type=int, default=None)
    about.add_argument("--batch-size", type=int, default=64)
    about.add_argument("--trust", action="store_true", help="load classes outside kd that config.json names")
    return about


def run(options: argparse.Namespace) -> int:
    """Print a line for each image; 1 where some could not be read."""
    from kd import device, saved

    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected a number above 0")
    predictor = Predictor(saved.find(options.run), options.teacher, options.top, options.device, options.trust)
    device.set_up(predictor.device, options.threads)
    failed = 0
    for found in predictor.stream(list_images(options.images, sys.stdin), options.batch_size):
        if isinstance(found, UserError):
            failed += 1
            print(f"kd: {found}", file=sys.stderr, flush=True)
        else:
            print(found.as_json() if options.json else found.as_text())
    sys.stdout.flush()
    if failed:
        print(f"kd: {failed} of the images could not be read", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> None:
    """`python -m kd.predict` and `kd-predict`."""
    options = parser().parse_args(arguments)
    try:
        code = run(options)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        from kd.cli import report

        code = report(error)
    sys.exit(code)


if __name__ == "__main__":
    main()
