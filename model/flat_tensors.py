"""All tensors of an adapter in some layers, end to end in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from lobra.layout.shapes import ModelShape
from lobra.model.adapter import AdapterSpec
from lobra.model.adapter_tensor import AdapterTensor
from lobra.model.site import sites_by_input


@dataclass(frozen=True)
class FlatTensors:
    """An adapter's tensors in consecutive `adapted_layers`, end to end in one flat tensor.

    Layer by layer; in a layer, those of linears that share an input lie together, A before B, and
    the base's vectors that the task trains come last.
    """

    tensors: tuple[AdapterTensor, ...]

    @classmethod
    def of_layers(cls, spec: AdapterSpec, shape: ModelShape, layers: range) -> FlatTensors:
        """Return the tensors of these layers of a model."""
        return cls(tuple(_in_order(spec, shape, layers)))

    @classmethod
    def whole(cls, spec: AdapterSpec, shape: ModelShape) -> FlatTensors:
        """Return all tensors of an adapter."""
        return cls.of_layers(spec, shape, shape.adapted_layers)

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each tensor lies, by its name."""
        places, start = {}, 0
        for tensor in self.tensors:
            places[tensor.name] = slice(start, start + tensor.numel)
            start += tensor.numel
        return places

    @cached_property
    def of_base(self) -> dict[str, AdapterTensor]:
        """The tensors by what they are called in the base model, if they are of it."""
        return {tensor.base_name: tensor for tensor in self.tensors}

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors)

    def span(self, layers: range) -> slice:
        """Return where the tensors of some of the layers lie: in one piece."""
        before = sum(t.numel for t in self.tensors if t.site.layer < layers.start)
        own = sum(t.numel for t in self.tensors if t.site.layer in layers)
        return slice(before, before + own)

    def rate_factors(self, layers: range) -> list[tuple[int, float]]:
        """Return (elements, rate factor) of runs of the tensors of some of the layers."""
        own = (tensor for tensor in self.tensors if tensor.site.layer in layers)
        runs = groupby(own, key=lambda tensor: tensor.rate_factor)
        return [(sum(tensor.numel for tensor in run), factor) for factor, run in runs]

    def rows(self, flat: Tensor, *tensors: AdapterTensor) -> Tensor:
        """Return a view of tensors that lie one after another, as rows [sum of r, f]."""
        start, stop = self.places[tensors[0].name].start, self.places[tensors[-1].name].stop
        return flat[start:stop].view(-1, tensors[0].num_columns)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return all tensors, with PEFT's names and shapes."""
        return {t.name: t.as_peft(self.rows(flat, t)) for t in self.tensors}

    @torch.no_grad()
    def fill(self, flat: Tensor, named: Mapping[str, Tensor]) -> None:
        """Copy tensors with PEFT's names and shapes into their places.

        Raises
        ------
        KeyError
            If one is missing.
        ValueError
            If one has another shape.
        """
        for tensor in self.tensors:
            value = named[tensor.name]
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: {tuple(value.shape)} instead of {tensor.shape}")
            self.rows(flat, tensor).copy_(tensor.as_rows(value))


def _in_order(spec: AdapterSpec, shape: ModelShape, layers: range) -> Iterator[AdapterTensor]:
    for layer in layers:
        for sites in sites_by_input(shape, layer):
            tensors = [tensor for site in sites for tensor in spec.tensors(site)]
            yield from sorted(tensors, key=lambda tensor: tensor.side)  # a stable sort
        yield from spec.vectors(shape, layer)
