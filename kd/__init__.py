"""kd: knowledge distillation for image classification.

from kd import compose, run
result = run(compose("teacher=vit_b", "student=resnet18"))
"""

__version__ = "0.1.0"
__all__ = ["compose", "run"]


def __getattr__(name: str):
    """`compose` and `run`, imported when they are asked for."""
    if name == "compose":
        from kd.config import compose

        return compose
    if name == "run":
        from kd.train import run

        return run
    raise AttributeError(f"module 'kd' has no attribute '{name}'")
