"""Networks with their preprocessing: build, save and load classifiers, read foreign weights, count, fold."""

from kd.models.build import build
from kd.models.classifier import Classifier
from kd.models.cost import count_macs, count_parameters
from kd.models.fold import fold_batchnorm
from kd.models.foreign import load_weights
from kd.models.lean import lean_linears
from kd.models.store import load, save

__all__ = [
    "Classifier",
    "build",
    "count_macs",
    "count_parameters",
    "fold_batchnorm",
    "has_hub_weights",
    "lean_linears",
    "load",
    "load_weights",
    "save",
]


def has_hub_weights(spec: dict) -> bool:
    """Whether timm's hub has weights for the network of a model YAML; imports timm only if it could."""
    if "_target_" in (spec.get("args") or {}):
        return False
    from kd.models.hub import has_weights

    return has_weights(spec["name"])
