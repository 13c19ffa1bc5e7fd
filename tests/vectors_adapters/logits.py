"""Adapters of the terms on logits."""

from __future__ import annotations

from kd.contracts import Output
from kd.losses import (
    Correlations,
    CosineLogits,
    CrossEntropy,
    DecoupledKD,
    HardTargets,
    LossSum,
    MSELogits,
    MultiLevel,
    NormalisedKD,
    SoftTargets,
    TransformedTeacher,
)
from kd.losses.multilevel import batch_level, class_level, instance_level
from kd.losses.numerics import full
from vectors_adapters import adapter, batch, outputs, run


@adapter("kd")
def kd(inputs, hyperparameters, dtype):
    temperature = hyperparameters["temperature"]
    ce = CrossEntropy(weight=hyperparameters["ce_weight"])
    soft = SoftTargets(temperature=temperature, weight=hyperparameters["kd_weight"])
    total, values = LossSum({"ce": ce, "kd": soft})(*outputs(inputs), batch(inputs))
    return {
        "loss": values["kd"],
        "loss_kl": values["kd"] / temperature**2,
        "loss_ce_weighted": ce.weight * values["ce"],
        "loss_total": total,
    }


@adapter("dkd")
def dkd(inputs, hyperparameters, dtype):
    alpha, beta, temperature = (hyperparameters[key] for key in ("alpha", "beta", "temperature"))
    weights = {"loss": (alpha, beta), "loss_tckd": (1, 0), "loss_nckd": (0, 1)}
    return {
        name: run(DecoupledKD(temperature, target, nontarget), *outputs(inputs), batch(inputs))
        for name, (target, nontarget) in weights.items()
    }


@adapter("dist")
def dist(inputs, hyperparameters, dtype):
    beta, gamma, tau, eps = (hyperparameters[key] for key in ("beta", "gamma", "tau", "eps"))
    weights = {"loss": (beta, gamma), "loss_inter": (1, 0), "loss_intra": (0, 1)}
    return {
        name: run(Correlations(tau, inter, intra, eps), *outputs(inputs), batch(inputs))
        for name, (inter, intra) in weights.items()
    }


@adapter("nkd")
def nkd(inputs, hyperparameters, dtype):
    weights = {"loss": hyperparameters["gamma"], "loss_target": 0.0}
    return {
        name: run(NormalisedKD(hyperparameters["temperature"], gamma), *outputs(inputs), batch(inputs))
        for name, gamma in weights.items()
    }


@adapter("lskd")
def lskd(inputs, hyperparameters, dtype):
    term = SoftTargets(temperature=hyperparameters["temperature"], standardise=True)
    return {"loss": run(term, *outputs(inputs), batch(inputs))}


@adapter("lskd_dkd")
def lskd_dkd(inputs, hyperparameters, dtype):
    alpha, beta, temperature = (hyperparameters[key] for key in ("alpha", "beta", "temperature"))
    return {"loss": run(DecoupledKD(temperature, alpha, beta, standardise=True), *outputs(inputs), batch(inputs))}


@adapter("mlkd_pieces")
def mlkd_pieces(inputs, hyperparameters, dtype):
    pair = full(inputs["student_logits"]), full(inputs["teacher_logits"])
    levels = {"instance": instance_level, "batch": batch_level, "class": class_level}
    parts = {f"loss_{name}": level(*pair, hyperparameters["temperature"]) for name, level in levels.items()}
    return {"loss": sum(parts.values()), **parts}


@adapter("mlkd")
def mlkd(inputs, hyperparameters, dtype):
    first, second, third, *weak = hyperparameters["temperature"], *hyperparameters["extra_temperatures"]
    term = MultiLevel((first, second, third), weak, standardise=hyperparameters["logit_stand"])
    student, teacher = outputs(inputs, "_weak")
    student.second, teacher.second = outputs(inputs, "_strong")
    ce = hyperparameters["ce_weight"] * run(CrossEntropy(views=2), student, teacher, batch(inputs))
    weight = hyperparameters["kd_weight"]
    parts = {name: weight * value for name, value in term.parts(student, teacher).items()}
    total = ce + weight * run(term, student, teacher, batch(inputs))
    return {
        "loss": total,
        "loss_ce": ce,
        "loss_kd": parts["instance"],
        "loss_cc": parts["class"],
        "loss_bc": parts["batch"],
    }


def _with_token(inputs) -> tuple[Output, Output]:
    student, teacher = outputs(inputs)
    student.extra_logits = inputs["student_logits_kd"]
    return student, teacher


def _deit(term, inputs, alpha):
    pair = _with_token(inputs)
    distill = run(term, *pair, batch(inputs))
    label = run(CrossEntropy(), *pair, batch(inputs))
    return {"loss": (1 - alpha) * label + alpha * distill, "loss_distill": distill}


@adapter("deit_hard")
def deit_hard(inputs, hyperparameters, dtype):
    return _deit(HardTargets(token=True), inputs, hyperparameters["alpha"])


@adapter("deit_soft")
def deit_soft(inputs, hyperparameters, dtype):
    term = SoftTargets(temperature=hyperparameters["tau"], per_class=True, token=True)
    return _deit(term, inputs, hyperparameters["alpha"])


@adapter("ttm")
def ttm(inputs, hyperparameters, dtype):
    return {"loss": run(TransformedTeacher(1 / hyperparameters["l"]), *outputs(inputs), batch(inputs))}


@adapter("wttm")
def wttm(inputs, hyperparameters, dtype):
    return {"loss": run(TransformedTeacher(1 / hyperparameters["l"], weighted=True), *outputs(inputs), batch(inputs))}


@adapter("mse_logits")
def mse_logits(inputs, hyperparameters, dtype):
    return {"loss": run(MSELogits(), *outputs(inputs), batch(inputs))}


@adapter("cosine")
def cosine(inputs, hyperparameters, dtype):
    terms = {"loss": False, "loss_pearson": True}
    return {
        name: run(CosineLogits(centred, hyperparameters["eps"]), *outputs(inputs), batch(inputs))
        for name, centred in terms.items()
    }
