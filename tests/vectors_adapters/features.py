"""Adapters of the terms on features."""

from torch import nn

from kd.losses.attention import AttentionTransfer, Flow, NeuronSelectivity
from kd.losses.boundary import ActivationBoundary, Overhaul, normal_margin
from kd.losses.factors import FactorTransfer
from kd.losses.features import FitNet, Variational
from kd.losses.heads import SimKD, SoftmaxRegression
from kd.losses.ofa import OneForAll
from kd.losses.reviewkd import ReviewKD
from vectors_adapters import adapter, batch, outputs, plant, projections, run


def stages(inputs) -> list[str]:
    """The names that `outputs` gives to the case's features."""
    return [f"stage{n + 1}" for n in range(sum(key.startswith("student_features.") for key in inputs))]


def ready(term, inputs, dtype, head=False):
    """(term, student, teacher) after set-up in the case's precision."""
    student, teacher = outputs(inputs)
    if head:
        weight = inputs["teacher_head.weight"]
        teacher.head = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
        teacher.head.load_state_dict({name: inputs[f"teacher_head.{name}"] for name in ("weight", "bias")})
    term.setup(student, teacher, num_classes=student.logits.shape[1], num_samples=16)
    return term.to(dtype).train(), student, teacher


def staged(term, inputs, dtype, name="stage", sized=False):
    """`loss` and `loss_<name>N` of a term without projections."""
    term, student, teacher = ready(term, inputs, dtype) if sized else (term, *outputs(inputs))
    parts = term.parts(student, teacher, batch(inputs))
    return {"loss": run(term, student, teacher, batch(inputs))} | {f"loss_{name}{n}": p for n, p in enumerate(parts)}


@adapter("fitnet")
def fitnet(inputs, hyperparameters, dtype):
    proj = projections(inputs)
    term = FitNet(stages(inputs), regressor="linear", bias="bias" in proj)
    term, student, teacher = ready(term, inputs, dtype)
    weight = proj["weight"] if proj["weight"].dim() == 4 else proj["weight"][:, :, None, None]
    plant(term, {"regressors.0.weight": weight} | {f"regressors.0.{k}": v for k, v in proj.items() if k == "bias"})
    return {"loss": run(term, student, teacher, batch(inputs))}


@adapter("fitnet_convreg")
def fitnet_convreg(inputs, hyperparameters, dtype):
    term, student, teacher = ready(FitNet(stages(inputs), relu=True), inputs, dtype)
    plant(term, {f"regressors.0.{name}": tensor for name, tensor in projections(inputs).items()})
    return {"loss": run(term, student, teacher, batch(inputs))}


@adapter("at")
def at(inputs, hyperparameters, dtype):
    return staged(AttentionTransfer(stages(inputs), power=hyperparameters["p"]), inputs, dtype)


@adapter("at_paper")
def at_paper(inputs, hyperparameters, dtype):
    return staged(AttentionTransfer(stages(inputs), power=hyperparameters["p"], form="paper"), inputs, dtype)


@adapter("nst")
def nst(inputs, hyperparameters, dtype):
    return staged(NeuronSelectivity(stages(inputs)), inputs, dtype)


@adapter("fsp")
def fsp(inputs, hyperparameters, dtype):
    return staged(Flow(stages(inputs)), inputs, dtype, "pair", sized=True)


@adapter("ft")
def ft(inputs, hyperparameters, dtype):
    powers = {"factor_power": hyperparameters["p1"], "distance_power": hyperparameters["p2"]}
    return staged(FactorTransfer(stages(inputs), rate=None, **powers), inputs, dtype)


@adapter("ab")
def ab(inputs, hyperparameters, dtype):
    return staged(ActivationBoundary(stages(inputs), margin=hyperparameters["margin"]), inputs, dtype, sized=True)


@adapter("reviewkd_hcl")
def reviewkd(inputs, hyperparameters, dtype):
    return staged(ReviewKD(stages(inputs), fusion=False, levels=hyperparameters["levels"]), inputs, dtype)


@adapter("vid")
def vid(inputs, hyperparameters, dtype):
    term, student, teacher = ready(Variational(stages(inputs), eps=hyperparameters["eps"]), inputs, dtype)
    proj = {name.replace("regressor.", "regressors.0."): t for name, t in projections(inputs).items()}
    plant(term, {name.replace("log_scale", "log_scales.0"): tensor for name, tensor in proj.items()})
    return {"loss": run(term, student, teacher, batch(inputs))}


@adapter("ofd")
def ofd(inputs, hyperparameters, dtype):
    term = Overhaul(stages(inputs), kernel_size=hyperparameters["kernel_size"])
    term, student, teacher = ready(term, inputs, dtype)
    plant(term, {name.removeprefix("connectors."): tensor for name, tensor in projections(inputs).items()})
    norms = [tuple(inputs[f"teacher_bn.{n}.{k}"] for k in ("weight", "bias")) for n in range(len(stages(inputs)))]
    term.set_margins(norms)
    margins = {f"margin.{n}": normal_margin(bias, weight) for n, (weight, bias) in enumerate(norms)}
    return {"loss": run(term, student, teacher, batch(inputs))} | margins


@adapter("simkd")
def simkd(inputs, hyperparameters, dtype):
    term = SimKD(stages(inputs), factor=hyperparameters["factor"], target="map", relu=True)
    term, student, teacher = ready(term, inputs, dtype, head=True)
    plant(term, {f"head.{name}": tensor for name, tensor in projections(inputs).items()})
    return {"loss": run(term, student, teacher, batch(inputs)), "student_prediction": term.student_logits(student)}


@adapter("srrl")
def srrl(inputs, hyperparameters, dtype):
    weights = {"feature_weight": hyperparameters["alpha"], "logit_weight": hyperparameters["beta"]}
    term = SoftmaxRegression(stages(inputs), stages(inputs), relu=True, **weights)
    term, student, teacher = ready(term, inputs, dtype, head=True)
    plant(term, {name.replace("Connectors.", "connector."): tensor for name, tensor in projections(inputs).items()})
    features, logits = term.pair(student, teacher)
    return {"loss": run(term, student, teacher, batch(inputs)), "loss_fm": features, "loss_sr": logits}


@adapter("ofa")
def ofa(inputs, hyperparameters, dtype):
    term = OneForAll((), exponent=hyperparameters["eps"], temperature=hyperparameters["temperature"])
    return {"loss": run(term, *outputs(inputs), batch(inputs))}
