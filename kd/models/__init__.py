"""Networks with their preprocessing: build, save and load classifiers, read foreign weights, count, fold."""

from kd.models.build import build
from kd.models.classifier import Classifier
from kd.models.cost import count_macs, count_parameters
from kd.models.fold import fold_batchnorm
from kd.models.foreign import load_weights
from kd.models.lean import lean_linears
from kd.models.store import allow, load, save

__all__ = [
    "Classifier",
    "allow",
    "build",
    "count_macs",
    "count_parameters",
    "fold_batchnorm",
    "lean_linears",
    "load",
    "load_weights",
    "save",
]
