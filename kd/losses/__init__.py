"""Distillation losses: terms that each give one scalar, and their weighted sum."""

from kd.losses.attention import AttentionTransfer, Flow, NeuronSelectivity
from kd.losses.boundary import ActivationBoundary, Overhaul
from kd.losses.contrast import ContrastMemory, ContrastQueue
from kd.losses.factors import FactorTransfer
from kd.losses.features import FeatureTerm, FitNet, Variational
from kd.losses.heads import SimKD, SoftmaxRegression
from kd.losses.logits import (
    Correlations,
    CosineLogits,
    CrossEntropy,
    DecoupledKD,
    HardTargets,
    LogitTerm,
    MSELogits,
    NormalisedKD,
    SoftTargets,
    TransformedTeacher,
)
from kd.losses.multilevel import MultiLevel
from kd.losses.ofa import OneForAll
from kd.losses.relations import Distances, Kernels, Probabilities, RelationTerm, SampleProducts, Similarities
from kd.losses.reviewkd import ReviewKD
from kd.losses.sum import LossSum, build
from kd.losses.term import Term

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "ContrastMemory",
    "ContrastQueue",
    "Correlations",
    "CosineLogits",
    "CrossEntropy",
    "DecoupledKD",
    "Distances",
    "FactorTransfer",
    "FeatureTerm",
    "FitNet",
    "Flow",
    "HardTargets",
    "Kernels",
    "LogitTerm",
    "LossSum",
    "MSELogits",
    "MultiLevel",
    "NeuronSelectivity",
    "NormalisedKD",
    "OneForAll",
    "Overhaul",
    "Probabilities",
    "RelationTerm",
    "ReviewKD",
    "SampleProducts",
    "SimKD",
    "Similarities",
    "SoftTargets",
    "SoftmaxRegression",
    "Term",
    "TransformedTeacher",
    "Variational",
    "build",
]
