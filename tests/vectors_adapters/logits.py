"""Adapters of the terms on logits."""

from __future__ import annotations

from kd.losses import SoftTargets
from vectors_adapters import adapter, batch, outputs, run


@adapter("kd", without=("loss_ce_weighted", "loss_total"))
def kd(inputs, hyperparameters, dtype):
    loss = run(SoftTargets(temperature=hyperparameters["temperature"]), *outputs(inputs), batch(inputs))
    return {"loss": loss, "loss_kl": loss / hyperparameters["temperature"] ** 2}
