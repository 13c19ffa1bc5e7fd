"""The teacher's answers, kept on the disk: the first run writes them while it trains, later runs read them.

What is kept of a batch follows from the key alone: the frozen teacher, the data and its split, the view policy, the
seed and the batch size, on one kind of device with one number of threads. So an answer read is the answer the teacher
would give, bit for bit, and no setting of the cache changes a result. One file an epoch, one record a step, with its
checksum: a record that was cut off or spoilt is not there, and is written again.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd import files
from kd.contracts import Batch, Output
from kd.hints import ConfigError

FORMAT = 1  # of the records and of what the key means
KEPT = ("logits", "penultimate")  # features that are small enough to keep
HEADER = struct.Struct("<II")  # a mark, then the checksum of the payload
MARK = 0x1CED_BEEF
INTERVAL = 20  # steps whose answers wait for the disk, so that no step waits for the device
CHECKS = 2  # answers read that are asked again and compared


class Records:
    """Records of one size, addressed by (epoch, step); a process that reads sees what another has written so far."""

    def __init__(self, folder: Path, size: int):
        """`size`: bytes of a payload."""
        self.folder, self.size, self._open = folder, size, {}

    def read(self, epoch: int, step: int) -> bytearray | None:
        """The payload; None where there is none, or not a whole one."""
        file = self._file(epoch, writing=False)
        if file is None:
            return None
        record = bytearray(HEADER.size + self.size)
        file.seek(step * len(record))
        if file.readinto(record) != len(record):
            return None
        mark, check = HEADER.unpack_from(record)
        payload = record[HEADER.size :]
        return payload if mark == MARK and check == zlib.crc32(payload) else None

    def write(self, epoch: int, step: int, payload: bytes) -> None:
        """Put a record in its place. Raises OSError, such as for a full disk."""
        file = self._file(epoch, writing=True)
        file.seek(step * (HEADER.size + self.size))
        file.write(HEADER.pack(MARK, zlib.crc32(payload)) + payload)

    def clear(self) -> None:
        """Forget every record."""
        self.close()
        for path in self.folder.glob("epoch_*"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.close()
        self._open = {}

    def _file(self, epoch: int, writing: bool) -> Any:
        """The epoch's file, unbuffered; the others are closed. None where it is to be read and is not there."""
        if (epoch, writing) not in self._open:
            path = self.folder / f"epoch_{epoch:05d}"
            if not writing and not path.exists():
                return None
            for other in [key for key in self._open if key[1] == writing]:
                self._open.pop(other).close()
            if writing:
                path.touch()
            self._open[epoch, writing] = open(path, "r+b" if writing else "rb", buffering=0)  # noqa: SIM115
        return self._open[epoch, writing]


class Layout:
    """How an answer lies in a payload: the logits, then what else is kept, (B, width) each."""

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: torch.dtype):
        """`widths` by feature, in KEPT's order; `rows` are those of a batch."""
        self.rows, self.widths, self.dtype = rows, dict(widths), dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * sum(self.widths.values()) * self.dtype.itemsize

    def pack(self, parts: Mapping[str, Tensor]) -> bytes:
        """Tensors on any device -> a payload."""
        flat = [parts[n].to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes() for n in self.widths]
        return b"".join(flat)

    def unpack(self, payload: bytearray) -> dict[str, Tensor]:
        """A payload -> tensors on the CPU, which share its memory."""
        flat, parts = torch.frombuffer(payload, dtype=self.dtype), {}
        sizes = [self.rows * width for width in self.widths.values()]
        for (name, width), part in zip(self.widths.items(), flat.split(sizes), strict=True):
            parts[name] = part.view(self.rows, width)
        return parts


def layout_of(output: Output, rows: int, half: bool) -> Layout:
    """The layout of a teacher's answers to batches of so many rows, from one answer of it."""
    parts = {"logits": output.logits, **{n: output.features[n] for n in KEPT if n in output.features}}
    return Layout(rows, {n: part.shape[1] for n, part in parts.items()}, torch.bfloat16 if half else torch.float32)


class Remembering:
    """(view, raw batch) -> the teacher's output: read where it is kept, else asked, and kept if nobody else does it."""

    def __init__(
        self,
        ask: Callable[[Batch, Batch], Output],
        records: Records,
        layout: Layout,
        *,
        steps_per_epoch: int,
        cycle_epochs: int | None = None,
        features: Sequence[str] = (),
        head: nn.Module | None = None,
        lock: Any = None,
        say: Callable[[str], None] = print,
    ):
        """`lock` is held by the writer, and by nobody else; None: only read."""
        self.ask, self.records, self.layout = ask, records, layout
        self.steps, self.cycle = steps_per_epoch, cycle_epochs
        self.features, self.head, self.lock, self.say = features, head, lock, say
        self.read = self.asked = self.checked = 0  # batches
        self._trusted = True
        self._waiting: list[tuple[int, int, dict[str, Tensor]]] = []

    def __call__(self, batch: Batch, raw: Batch) -> Output:
        """The output, on the batch's device."""
        epoch, step = self.place(raw)
        kept = self._kept(epoch, step, batch.images.device)
        if kept is not None and self.checked < CHECKS:
            kept = self._confirmed(kept, batch, raw)
        if kept is not None:
            self.read += 1
            return kept
        output = self.ask(batch, raw)
        self.asked += 1
        if self.lock is not None:
            self._waiting.append((epoch, step, self._parts(output)))
            if len(self._waiting) >= INTERVAL:
                self.flush()
        return output

    def place(self, raw: Batch) -> tuple[int, int]:
        """(epoch, step): where a batch's answer lies; epochs that repeat the same views share a place."""
        epoch = int(raw.epoch)
        step = round((raw.epoch - epoch) * self.steps)
        return epoch % self.cycle if self.cycle else epoch, step

    def flush(self) -> None:
        """Write what waits. A disk that is full ends the writing, not the run."""
        waiting, self._waiting = self._waiting, []
        try:
            for epoch, step, parts in waiting:
                self.records.write(epoch, step, self.layout.pack(parts))
        except OSError as error:
            self.say(f"warning: the teacher cache cannot grow ({error.strerror}); the teacher is asked instead")
            self._release()

    def close(self) -> dict[str, Any]:
        """Write what waits and let others write; gives how many batches were read and asked."""
        self.flush()
        self.records.close()
        self._release()
        return {"cache": {"folder": self.records.folder.name, "batches_read": self.read, "batches_asked": self.asked}}

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _kept(self, epoch: int, step: int, device: torch.device) -> Output | None:
        payload = self.records.read(epoch, step) if self._trusted else None
        if payload is None:
            return None
        parts = {n: part.to(device, non_blocking=True) for n, part in self.layout.unpack(payload).items()}
        return Output(parts["logits"], {n: parts[n] for n in self.features}, self.head)

    def _parts(self, output: Output) -> dict[str, Tensor]:
        return {"logits": output.logits, **{n: output.features[n] for n in self.features}}

    def _confirmed(self, kept: Output, batch: Batch, raw: Batch) -> Output | None:
        """The same output if the teacher still says so; else None, and what was kept is dropped."""
        self.checked += 1
        found = self._parts(self.ask(batch, raw))
        if all(agree(found[n], part) for n, part in self._parts(kept).items()):
            return kept
        self.say(
            f"warning: the teacher cache {self.records.folder} differs from what the teacher says now; it is not used"
        )
        if self.lock is not None:
            self.records.clear()
        self._trusted = self.lock is not None  # another process's is left alone, and not read
        return None


def agree(found: Tensor, kept: Tensor) -> bool:
    """Whether two answers are one, to a few roundings of the precision that is kept."""
    scale = found.float().abs().max().clamp(min=1e-6)
    step = 2**-8 if kept.dtype == torch.bfloat16 else 2**-16
    return bool((found.float() - kept.float()).abs().max() <= 4 * step * scale)


def digest_of(classifier: nn.Module) -> str:
    """What a frozen network computes: its weights as they are (folded, cast), its structure and its preprocessing."""
    total = hashlib.sha256(f"{classifier!r} {getattr(classifier, 'average', None)}".encode())
    for name, value in classifier.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def digest_of_rows(split: Any) -> str:
    """Which images of the pool a split holds, in its order: split, fraction and skipped files come down to this."""
    return hashlib.sha256(split.index.numpy().tobytes()).hexdigest()


def ground(device: str) -> dict[str, Any]:
    """What the last bit of an answer depends on beside settings."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def identity(
    cfg: Any, dataset: Any, classifier: nn.Module, layout: Layout, *, device: str, compiled: bool
) -> dict[str, Any]:
    """Everything that an answer is a function of, beside (epoch, step)."""
    view = {k: v for k, v in vars(cfg.augment).items() if k != "cycle_epochs"}  # epochs are counted within the cycle
    return {
        "format": FORMAT,
        "teacher": digest_of(classifier),
        "kept": layout.widths,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "compiled": compiled,
        "data": dataset.digest,
        "rows": digest_of_rows(dataset.train),
        "view": {**view, "mirror": dataset.mirror, "size": dataset.image_size, "channels": dataset.channels},
        "seed": cfg.seed,
        "batch_size": layout.rows,
        **ground(device),
    }


def open_cache(
    cfg: Any,
    dataset: Any,
    classifier: nn.Module,
    ask: Callable[[Batch, Batch], Output],
    *,
    layout: Layout,
    features: Sequence[str],
    steps: int,
    device: str,
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> Callable[[Batch, Batch], Output]:
    """`ask` with a memory for a run of so many steps, or `ask` itself where the answers would not fit.

    Raises ConfigError where `teacher.cache=on` cannot be.
    """
    per_epoch, cycle = dataset.train.steps(cfg.recipe.batch_size), cfg.augment.cycle_epochs
    places = min(steps, cycle * per_epoch) if cycle else steps
    key = identity(cfg, dataset, classifier, layout, device=device, compiled=compiled)
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = f"{cfg.dataset.name}-{cfg.teacher.name.split('/')[-1]}-s{cfg.seed}-{mark[:12]}"
    folder = Path(cfg.runs_dir) / ".cache" / name
    if not room(cfg, folder, places * layout.size, say):
        return ask
    lock = become_writer(folder, key)
    there = min(places, sum(p.stat().st_size for p in folder.glob("epoch_*")) // (HEADER.size + layout.size))
    seconds = timed(ask, cfg, dataset, device) if there < places else 0.0
    say(announce(folder, places, there, layout, lock is not None, seconds))
    return Remembering(
        ask,
        Records(folder, layout.size),
        layout,
        steps_per_epoch=per_epoch,
        cycle_epochs=cycle,
        features=features,
        head=getattr(classifier, "head", None),
        lock=lock,
        say=say,
    )


def become_writer(folder: Path, key: dict[str, Any]) -> Any:
    """The cache's lock, held; None where another process holds it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    if not (folder / "key.json").exists():
        files.write_json(folder / "key.json", key)
    return lock


def cacheable(mode: str, loss: Any) -> bool:
    """Whether the answers that a loss needs are to be kept. Raises ConfigError for `on` where they are feature maps."""
    large = [f for f in loss.teacher_features if f not in KEPT]
    if large and mode == "on":
        raise ConfigError(
            f"teacher.cache=on: the loss needs the teacher's {', '.join(large)}, and only its logits and penultimate "
            "features are small enough to keep. Type teacher.cache=auto, or choose terms on logits, such as loss=kd"
        )
    if loss.views > 1 and mode == "on":
        raise ConfigError(
            "teacher.cache=on: the loss shows the teacher two views of an image, the cache has one. Type teacher.cache=auto"
        )
    return mode != "off" and not large and loss.views == 1


def room(cfg: Any, folder: Path, size: int, say: Callable[[str], None]) -> bool:
    """Whether this cache, beside those that are there, keeps within `teacher.cache_gib`. ConfigError with `on`."""
    limit, others = cfg.teacher.cache_gib * 2**30, sum(held(folder.parent, but=folder))
    if size + others <= limit:
        return True
    reason = (
        f"the teacher's answers would take {in_words(size)} beside {in_words(others)} in {folder.parent}, "
        f"and teacher.cache_gib={cfg.teacher.cache_gib:g}"
    )
    if cfg.teacher.cache == "on":
        raise ConfigError(f"{reason}. Raise it, delete old caches there, or bound them with augment.cycle_epochs=N")
    say(f"teacher cache: none, {reason}")
    return False


def held(folder: Path, but: Path) -> Iterator[int]:
    """Bytes of the files of every other cache."""
    for path in folder.glob("*/epoch_*"):
        if path.parent != but:
            yield path.stat().st_size


def timed(ask: Callable[[Batch, Batch], Output], cfg: Any, dataset: Any, device: str) -> float:
    """Seconds that the teacher takes for a batch, from the second: the first may compile."""
    raw = next(dataset.train.epoch(0, cfg.recipe.batch_size, cfg.seed, device=device))
    view = Batch(raw.images.float() / 255, raw.targets, raw.index, raw.epoch, raw.seed)
    for _ in range(2):
        started = time.perf_counter()
        ask(view, raw).logits.float().sum().item()
    return time.perf_counter() - started


def announce(folder: Path, places: int, there: int, layout: Layout, writer: bool, seconds: float) -> str:
    """What the cache will take and save, in a line."""
    what, left = " and ".join(layout.widths), places - there
    parts = [f"teacher cache {folder}: {in_words(places * layout.size)} ({what} of {places} batches)"]
    parts += [f"{there} are there"] if there else []
    if left:
        doing = "written as this run asks for them" if writer else "asked for here, another process is writing"
        parts += [f"{left} {doing}, about {seconds * left / 60:.1f} min of the teacher's time"]
    return ", ".join(parts)


def in_words(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
