"""Adapters of the terms on relations between images, and of crd."""

from __future__ import annotations

import torch

from kd.losses import ContrastMemory, Distances, Kernels, Probabilities, SampleProducts, Similarities
from vectors_adapters import adapter, batch, outputs, plant, projections, run

FEATURE = {"stages": "stage1"}


@adapter("sp")
def sp(inputs, hyperparameters, dtype):
    return {"loss": run(Similarities(**FEATURE), *outputs(inputs), batch(inputs))}


@adapter("rkd")
def rkd(inputs, hyperparameters, dtype):
    far, angle, eps = (hyperparameters[key] for key in ("w_d", "w_a", "pdist_eps"))
    weights = {"loss": (far, angle), "loss_distance": (1, 0), "loss_angle": (0, 1)}
    return {name: run(Distances(*w, eps, **FEATURE), *outputs(inputs), batch(inputs)) for name, w in weights.items()}


@adapter("cc")
def cc(inputs, hyperparameters, dtype):
    return {"loss": run(SampleProducts(embed=None, **FEATURE), *outputs(inputs), batch(inputs))}


@adapter("correlation")
def correlation(inputs, hyperparameters, dtype):
    term = SampleProducts(embed=hyperparameters["feat_dim"], **FEATURE)
    student, teacher = outputs(inputs)
    term.setup(student, teacher, num_classes=2, num_samples=2)
    plant(term, {key.replace(".linear.", ".0."): value for key, value in projections(inputs).items()})
    return {"loss": hyperparameters["scale"] * run(term, student, teacher, batch(inputs))}


@adapter("cckd")
def cckd(inputs, hyperparameters, dtype):
    names = {"kernel": "kernel", "gamma": "gamma", "max_p": "order"}
    options = {ours: hyperparameters[theirs] for theirs, ours in names.items() if theirs in hyperparameters}
    return {"loss": run(Kernels(**options, **FEATURE), *outputs(inputs), batch(inputs))}


@adapter("pkt")
def pkt(inputs, hyperparameters, dtype):
    return {"loss": run(Probabilities(hyperparameters["eps"], **FEATURE), *outputs(inputs), batch(inputs))}


@adapter("crd")
def crd(inputs, hyperparameters, dtype):
    names = {"feat_dim": "dim", "nce_t": "temperature", "nce_k": "negatives", "nce_m": "momentum", "eps": "eps"}
    options = {ours: hyperparameters[theirs] for theirs, ours in names.items()}
    total, preset = hyperparameters["n_data"], hyperparameters["z_preset"]
    term = ContrastMemory(stage="stage1", **options)
    student, teacher = outputs(inputs)
    term.setup(student, teacher, num_classes=2, num_samples=total)
    z = [float("nan")] * 2 if preset is None else preset
    z = list(z.values()) if isinstance(z, dict) else z if isinstance(z, list) else [z] * 2
    constants = {
        name: torch.tensor(value, dtype=dtype).log() for name, value in zip(("log_z_s", "log_z_t"), z, strict=True)
    }
    linear = {key.replace(".linear.", "."): value for key, value in projections(inputs).items()}
    plant(term, linear | constants | {"memory_s": inputs["memory_v1"], "memory_t": inputs["memory_v2"]})
    term.draw = lambda _: inputs["contrast_index"]
    loss = run(term, student, teacher, batch(inputs))
    after = {"z_v1": term.log_z_s.exp(), "z_v2": term.log_z_t.exp()}
    return {"loss": loss, **after, "memory_v1_after": term.memory_s, "memory_v2_after": term.memory_t}
