"""The model card: a README.md beside a student's weights, written from its run record and nothing else.

python -m kd.card RUN_DIR        write it again, for instance when more seeds are done
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from kd.runs import Run

CARD = "README.md"
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 %, for 1..9 degrees of freedom


def write(run: Run) -> Path:
    """Write checkpoints/best/README.md of a run; the same records give the same bytes."""
    from kd import files

    path = run.folder / "checkpoints" / "best" / CARD
    files.write_text(path, text(run.record, seeds_of(run)))
    return path


def seeds_of(run: Run) -> list[dict[str, Any]]:
    """The records of the finished runs beside this one that differ from it in the seed alone, itself among them."""
    from kd import runs

    mine = _without_seed(run.record)
    others = [r.record for r in runs.records(run.folder.parent) if r.done and r.name != run.name]
    found = [r for r in others if r.get("metrics") and _without_seed(r) == mine]
    return sorted([run.record, *found], key=lambda r: r["config"]["seed"])


def _without_seed(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record["config"].items() if k != "seed"}


def text(record: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    """The card (Mitchell et al. 2019, arXiv:1810.03993) of a record, with intervals over `seeds`."""
    parts = [_head(record), _what(record), _loading(record), _metrics(record, seeds), _cost(record), _data(record)]
    return "\n\n".join([*parts, _use(record), _limits(record, seeds), _how(record)]) + "\n"


def _head(record: dict[str, Any]) -> str:
    name = record["config"]["dataset"]["name"]
    tags = ["image-classification", *(["knowledge-distillation"] if record.get("teacher") else [])]
    library = "timm" if _is_timm(record) else "kd"
    return "\n".join(["---", f"library_name: {library}", f"tags: [{', '.join(tags)}]", f"datasets: [{name}]", "---"])


def _is_timm(record: dict[str, Any]) -> bool:
    return "_target_" not in record["config"]["student"]["args"]


def _what(record: dict[str, Any]) -> str:
    config, data = record["config"], record["dataset"]
    classes = len(data["classes"])
    lines = [
        f"# {record['name']}",
        "",
        f"{config['student']['name']} ({record['parameters']:,} parameters) for {classes} classes of "
        f"{config['dataset']['name']}, images of {data['image_size']} pixels. {_origin(record)}",
    ]
    return "\n".join(lines)


def _origin(record: dict[str, Any]) -> str:
    teacher, start = record.get("teacher"), f"Weights: {record['initialised_from']}."
    if not teacher:
        return f"Trained on labels alone. {start}"
    metrics = teacher.get("metrics", {})
    top1 = f", test top-1 {_percent(metrics['test/top1'])}" if "test/top1" in metrics else ""
    source = teacher.get("run") or teacher.get("file")
    kept = f" at {teacher['checkpoint']}" if teacher.get("checkpoint", "best") != "best" else ""
    return f"Distilled from {teacher['name']} (`{source}`{kept}{top1}) with loss = {record['loss']}. {start}"


def _loading(record: dict[str, Any]) -> str:
    lines = [
        "## Loading",
        "",
        "```python",
        "from kd import models",
        'classifier = models.load("THIS_FOLDER")              # preprocessing is inside',
        "probs = classifier(images).logits.softmax(dim=1)     # images: uint8 (B, C, H, W), or float in [0, 1]",
        "```",
        "",
        "`python -m kd.predict THIS_FOLDER IMAGE` names the class of an image file.",
    ]
    if _is_timm(record):
        lines += [
            "",
            "Where `kd.built.stem` in config.json is `own`, timm reads the folder too, without the preprocessing:",
        ]
        lines += ["`timm.create_model('local-dir:THIS_FOLDER', pretrained=True)`."]
    return "\n".join(lines)


def _metrics(record: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    shown = [n for n in record["metrics"] if n.startswith(("test/", "val/"))]
    many = len(seeds) > 1
    title = f"mean ± std over {len(seeds)} seeds, 95 % interval of the mean" if many else None
    lines = ["## Metrics", "", f"| metric | this model | {title} |" if many else "| metric | this model |"]
    lines += ["| --- | --- | --- |" if many else "| --- | --- |"]
    for name in shown:
        cells = [f"`{name}`", _value(name, record["metrics"][name])]
        lines.append("| " + " | ".join(cells + ([_over_seeds(name, seeds)] if many else [])) + " |")
    lines += ["", "The test split chose nothing." if record["config"]["dataset"].get("select") == "val" else _CHOSEN]
    if "test/top1" in record["metrics"] and record["dataset"].get("test"):
        low, high = wilson(record["metrics"]["test/top1"], record["dataset"]["test"])
        lines[-1] += f" 95 % interval of test top-1 over its {record['dataset']['test']} images: "
        lines[-1] += f"{_percent(low)} to {_percent(high)} (Wilson)."
    if alone := record.get("baseline"):
        lines += [
            "",
            f"The same student without a teacher (`{alone['run']}`): {_percent(alone['test/top1'])} test top-1.",
        ]
    return "\n".join(lines)


_CHOSEN = "The epoch was chosen on the test split (`dataset.select=test`): its figures are optimistic."


def _over_seeds(name: str, seeds: list[dict[str, Any]]) -> str:
    values = [r["metrics"][name] for r in seeds if r["metrics"].get(name) is not None]
    if len(values) < 2:
        return ""
    mean, std = statistics.mean(values), statistics.stdev(values)
    half = (T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96) * std / math.sqrt(len(values))
    return f"{_value(name, mean)} ± {_value(name, std)}, {_value(name, mean - half)} to {_value(name, mean + half)}"


def wilson(rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate seen over `count` images (Wilson 1927)."""
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.3f}" if name.endswith(("nll", "kl")) else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _cost(record: dict[str, Any]) -> str:
    cost, machine = record.get("efficiency") or {}, record["environment"]
    if not cost:
        return "## Efficiency\n\nNot measured."
    size = (
        f"{cost['parameters']:,} parameters, {cost['macs'] / 1e6:,.1f} M multiply-accumulates an image, "
        f"{cost['size_mib']:.2f} MiB of weights."
    )
    if "latency_ms" not in cost:
        return f"## Efficiency\n\n{size} Not timed: the run was one of a sweep. `python -m kd.benchmark run=RUN_DIR` does it."
    speed = (
        f"{cost['precision']}, preprocessing counted in, on {machine['device_name']} ({_threads(cost['threads'])}, "
        f"torch {machine['torch']}): {cost['latency_ms']:.2f} ms for one image, {cost['images_per_s']:,.0f} images/s "
        f"in batches of {cost['batch_size']}."
        f"{' The machine was busy with other things: these times mean little.' if cost.get('disturbed') else ''}"
    )
    more = "`python -m kd.benchmark run=RUN_DIR` measures it with intervals, beside the teacher."
    return f"## Efficiency\n\n{size} {speed} {more}"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _data(record: dict[str, Any]) -> str:
    data, settings = record["dataset"], record["config"]["dataset"]
    sizes = ", ".join(f"{data[n]} {word}" for n, word in _SPLITS if data.get(n))
    fraction = settings.get("train_fraction", 1.0)
    lines = [
        "## Data",
        "",
        f"{settings['name']}: {sizes} images (content {data['digest'][:12]}, split seed {settings['split_seed']})."
        + (f" Training used {100 * fraction:g} % of the training images." if fraction < 1 else ""),
        "",
        f"Classes: {_list(data['classes'])}",
    ]
    return "\n".join(lines)


_SPLITS = (("train", "training"), ("val", "validation"), ("test", "test"))


def _list(classes: list[str], limit: int = 40) -> str:
    more = f", ... ({len(classes)} in all, in config.json)" if len(classes) > limit else ""
    return ", ".join(classes[:limit]) + more


def _use(record: dict[str, Any]) -> str:
    name = record["config"]["dataset"]["name"]
    return (
        "## Intended use\n\n"
        f"Naming the class of images like those of {name}, and studying distillation. "
        "It always answers with one of its classes: an image of something else gets a name too."
    )


def _limits(record: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    lines = [
        "## Limits",
        "",
        f"- It knows {len(record['dataset']['classes'])} classes and images that look like its training data.",
        "- Robustness, fairness between groups of people and other cameras or light were not measured.",
    ]
    if len(seeds) == 1:
        lines.append("- One seed: how much another seed would change the figures is not known.")
    if record.get("teacher"):
        lines.append("- It learnt its teacher's mistakes too; how often both agree is `test/agreement`.")
    if (ece := record["metrics"].get("test/ece")) is not None:
        lines.append(f"- Its probabilities miss the observed accuracy by {_percent(ece)} on average (`test/ece`).")
    return "\n".join(lines)


def _how(record: dict[str, Any]) -> str:
    machine, recipe = record["environment"], record["config"]["recipe"]
    return "\n".join([
        "## How it was made",
        "",
        f"{record['steps']} steps of {recipe['batch_size']} images, {recipe['optimizer']}, lr {recipe['lr']:g}, "
        f"weight decay {recipe['weight_decay']:g}, {recipe['schedule']} schedule, {record['precision']}, "
        f"seed {record['config']['seed']}; kd {machine['kd']}, torch {machine['torch']}, {machine['device']}. "
        f"Fingerprint {record['fingerprint'][:16]}.",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """`python -m kd.card RUN_DIR`."""
    from kd import cli, runs

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m kd.card", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN_DIR")
    try:
        print(write(runs.open_run(parser.parse_args(arguments).run)))
    except Exception as error:
        sys.exit(cli.report(error))


if __name__ == "__main__":
    main()
