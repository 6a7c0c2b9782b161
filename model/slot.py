"""A task's place on a rank: its adapter's canonical weights and their gradient, each flat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lobra.layout.shapes import ModelShape
from lobra.model import pissa
from lobra.model.adapter import AdapterSpec
from lobra.model.flat_tensors import FlatTensors


class Slot:
    """The adapter of one task in one stage.

    `weights` and `gradient` are flat and never move. They are canonical: unsharded, whatever the
    layout, in fp32 (in fp64 beside an fp64 model). The backward pass adds into `gradient`, and what
    did not run is zero without anyone filling it in.

    Attributes
    ----------
    number
        The task's, unique in the run.
    spec
        What is trained.
    layout
        Where each tensor lies in `weights`, in `gradient` and in `start`.
    start
        Of PiSSA, the weights it started from, whose product is taken out of the base; else None.
    projections
        Of VeRA, its frozen matrices; else None.
    """

    def __init__(
        self,
        number: int,
        spec: AdapterSpec,
        shape: ModelShape,
        layers: range,
        dtype: torch.dtype,
        device: torch.device,
        activations: torch.dtype | None = None,
    ) -> None:
        """Make a fresh adapter; what of it is frozen is in the dtype of the activations."""
        self.number = number
        self.spec = spec
        self.layout = FlatTensors.of_layers(spec, shape, layers)
        self.weights = torch.empty(self.layout.numel, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.weights)
        for tensor in self.layout.tensors:
            self.layout.rows(self.weights, tensor).copy_(tensor.start())
        self.projections = None
        if spec.kind == "vera":
            self.projections = spec.projections(shape).to(device, activations or dtype)
        self.start = self.weights.clone() if spec.kind == "pissa" else None

    @property
    def frozen_bytes(self) -> int:
        """Bytes of what is not trained."""
        start_bytes = 0 if self.start is None else self.start.nbytes
        return start_bytes + (0 if self.projections is None else self.projections.nbytes)

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Take weights over (PEFT's names and shapes); KeyError or ValueError if they do not fit.

        What a stage has copied of them is not renewed: that is `Stage.load`.
        """
        if self.start is not None:
            named, start = pissa.divided(named)
            self.layout.fill(self.start, start)
        self.layout.fill(self.weights, named)
