"""A network with its preprocessing and its classes: images in, logits and named features out."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.contracts import STAGES, Output
from kd.graft import GraftedHead
from kd.models import taps as tapping
from kd.models.preprocess import Preprocess

GRAFT = "graft."  # before the names of a grafted head's tensors


class Classifier(nn.Module):
    """(uint8, or float in [0, 1], (B, C, h, w)) -> Output, features on request.

    `network` holds the parameters, and `grafted` where a head was taken from another network (SimKD). `spec` is what was
    asked for, `built` what it came to (arguments, stem, sizes), `origin` where the weights are from.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        spec: Mapping,
        built: Mapping,
        classes: Sequence[str] | None = None,
        *,
        origin: Mapping | None = None,
    ):
        super().__init__()
        self.network, self.preprocess = network, preprocess
        self.spec, self.built = copy.deepcopy(dict(spec)), copy.deepcopy(dict(built))
        self.classes = list(classes) if classes is not None else None
        self.origin = dict(origin or {"weights": "scratch"})
        self.taps = tapping.find_taps(network)
        self.grafted: GraftedHead | None = None
        self.graft_stage: str | None = None
        self._stages: dict[str, dict] | None = None
        self._read = tapping.read

    @property
    def num_classes(self) -> int:
        """K, the width of the logits."""
        return self.built["num_classes"]

    @property
    def image_size(self) -> int:
        """Pixels of the view that the classifier was built for."""
        return self.preprocess.image_size

    @property
    def head(self) -> nn.Module | None:
        """Penultimate (B, D) -> logits (B, K); None where the network has no such layer."""
        return self.taps.head

    def forward(self, images: Tensor, features: Sequence[str] = ()) -> Output:
        """Logits (B, K), and the features named: stage1..stage4, tokens, penultimate, logits, or `module:PATH`.

        Raises ValueError for a feature that the network does not have.
        """
        stage = (self.graft_stage,) if self.grafted is not None and self.graft_stage not in features else ()
        named = tuple(f for f in (*features, *stage) if not f.startswith(tapping.PATH))
        paths = tuple(f for f in features if f.startswith(tapping.PATH))
        self.check_features(features)
        x = self.preprocess(images)
        dtype = next(self.network.parameters()).dtype
        if dtype != torch.float32:
            x = x.to(dtype)
        if not paths:
            logits, extra, found = self._read(self.network, self.taps, x, named)
        else:
            with tapping.hooked(self.network, paths) as hooked:
                logits, extra, found = tapping.read(self.network, self.taps, x, named)
            found.update(hooked)
        if self.grafted is not None:
            logits = self.grafted(found[self.graft_stage].to(next(self.grafted.parameters()).dtype))
        return Output(logits, {f: found[f] for f in features}, self.taps.head, extra)

    def graft(self, stage: str, head: GraftedHead) -> None:
        """From now on the logits are `head`'s, read from the map of `stage`, and the network's own head is idle."""
        self.check_features([stage])
        self.graft_stage, self.grafted = stage, head
        self.built["graft"] = {"stage": stage, "spec": head.spec}

    def tensors(self) -> dict[str, Tensor]:
        """The network's state dict, and a grafted head's under `graft.`: what is saved."""
        grafted = self.grafted.state_dict() if self.grafted is not None else {}
        return {**self.network.state_dict(), **{f"{GRAFT}{n}": v for n, v in grafted.items()}}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave; RuntimeError where it does not fit."""
        own = {n: v for n, v in tensors.items() if self.grafted is None or not n.startswith(GRAFT)}
        self.network.load_state_dict(own)
        if self.grafted is not None:
            self.grafted.load_state_dict({n[len(GRAFT) :]: v for n, v in tensors.items() if n not in own})

    def check_features(self, features: Sequence[str]) -> None:
        """Raises ValueError for a feature that the network does not have, naming those that it has."""
        for name in features:
            if name in self.taps.reasons:
                raise ValueError(f"{self.name} has no '{name}': {self.taps.reasons[name]}. It has {self._offer()}")
            if name.startswith(tapping.PATH):
                self._check_path(name)
            elif name not in self.taps.names:
                raise ValueError(f"{self.name} has no feature '{name}'. It has {self._offer()}, or module:PATH")

    def _check_path(self, name: str) -> None:
        path, known = name[len(tapping.PATH) :], [n for n, _ in self.network.named_modules() if n]
        if path not in known:
            near = difflib.get_close_matches(path, known, 3) or known[:8]
            raise ValueError(f"{self.name} has no module '{path}'. Near: {', '.join(near)}")

    def _offer(self) -> str:
        return ", ".join(self.taps.names)

    @property
    def name(self) -> str:
        """The network's name."""
        return self.spec.get("name", type(self.network).__name__)

    @torch.no_grad()
    def dry_forward(self) -> None:
        """One image through the network, in eval mode: how the stages look, and whether the head is what it seems."""
        self.taps = tapping.find_taps(self.network)
        forget_caches(self.network)
        parameter, training = next(self.network.parameters()), self.network.training
        x = self._probe(parameter.dtype, parameter.device)
        self.network.eval()
        try:
            names = [n for n in STAGES if n not in self.taps.reasons]
            final, maps = tapping.features(self.network, self.taps, x, names) if names else (None, {})
            if final is not None and parameter.device.type != "meta":
                tapping.settle_head(self.network, self.taps, final)
        finally:
            self.network.train(training)
        for name in [n for n, m in maps.items() if not (torch.is_tensor(m) and m.ndim == 4)]:
            del maps[name]
            self.taps.reasons[name] = "the network has no map (B, C, H, W) there"
        if "stage4" not in maps:
            self.taps.reasons["tokens"] = "the network has no last map"
        self._stages = {n: self._describe(n, m) for n, m in maps.items()}

    def _probe(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = (1, self.built["in_channels"], self.preprocess.size, self.preprocess.size)
        ramp = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device)
        return (ramp * 0.7).sin().view(shape).to(dtype)

    def _describe(self, name: str, x: Tensor) -> dict:
        side = self.preprocess.size
        return {
            "module": self.taps.parts[name],
            "shape": list(x.shape[1:]),  # [C, H, W]
            "reduction": round(side / x.shape[-1], 2),
        }

    def stages(self) -> dict[str, dict]:
        """{stage: {module, shape [C, H, W], reduction}} for the stages that the network has, from one dry forward."""
        if self._stages is None:
            self.dry_forward()
        return self._stages

    def compile(self, **options) -> None:
        """Compile the network and what reads its features; preprocessing stays as it is."""
        self._read = torch.compile(tapping.read, **options)

    def __getstate__(self) -> dict:
        """A copy starts uncompiled (compiled code belongs to the module that it was traced on) and without caches."""
        forget_caches(self.network)
        return {**self.__dict__, "_read": tapping.read}


def forget_caches(network: nn.Module) -> None:
    """Drop the position biases that some of timm's layers keep in eval mode: new weights would not reach them."""
    for module in network.modules():
        if getattr(module, "attention_bias_cache", None):
            module.attention_bias_cache = {}
