"""One task's adapter: which tensors it has at a linear layer, and how they lie in memory.

Everything that is known of an adapter's tensors is said here, in `AdapterSpec.tensors`. A tensor is
kept as *rows*, one for each of its ranks: A as [r, I] like PEFT, B as [r, O], the transpose of
PEFT's. Rows of several tasks, one below the other, are then one matrix, and so are those of several
linears.

Shape suffixes: I input features, O output features, f either, r LoRA rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from lobra.layout.shapes import FusedLinear, ModelShape, module_path
from lobra.model.base_linear import Shard
from lobra.model.vera import Projections

Pattern = tuple[tuple[str, float], ...]

VERA_D = 0.1  # what d starts at in PEFT; b starts at zero

# The linears of a decoder layer by the input they have in common.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)


@dataclass(frozen=True)
class Site:
    """A linear layer of the base model, where adapters may be; of a fused one, its parts."""

    layer: int
    module: str
    in_features: int
    out_features: int
    fused: FusedLinear | None = None

    @property
    def path(self) -> str:
        """Where it is in the base model."""
        return f"model.layers.{self.layer}.{module_path(self.module)}"


@dataclass(frozen=True)
class AdapterTensor:
    """One of an adapter's tensors.

    Attributes
    ----------
    name
        PEFT's name.
    site
        The linear layer it is at.
    side
        Whether it has a column for each of the site's inputs (A) or outputs (B), or one a rank.
    rank
        Its rows, those of a vector apart, which has one.
    bound
        At the start its elements are uniform in [-bound, bound].
    seed
        Of that draw.
    rate_factor
        What the task's learning rate is multiplied by.
    is_vector
        Whether PEFT has its only row as a vector.
    center
        What is added to its elements at the start.
    """

    name: str
    site: Site
    side: Literal["inputs", "outputs", "ranks"]
    rank: int
    bound: float
    seed: int
    rate_factor: float = 1.0
    is_vector: bool = False
    center: float = 0.0

    @property
    def num_columns(self) -> int:
        """Columns of the unsharded tensor."""
        if self.side == "ranks":
            return self.rank
        return self.site.in_features if self.side == "inputs" else self.site.out_features

    @property
    def num_rows(self) -> int:
        """Rows it lies in memory as."""
        return 1 if self.is_vector else self.rank

    @property
    def numel(self) -> int:
        """Elements of the unsharded tensor."""
        return self.num_rows * self.num_columns

    @property
    def shape(self) -> tuple[int, ...]:
        """PEFT's shape: A [r, I], B [O, r], a vector [f]."""
        if self.is_vector:
            return (self.num_columns,)
        if self.side == "inputs":
            return self.rank, self.num_columns
        return self.num_columns, self.rank

    def as_peft(self, rows_rf: Tensor) -> Tensor:
        """Return rows as PEFT has them: a view or, at a fused linear, a copy."""
        if self.is_vector:
            return rows_rf[0]
        if self.side == "inputs":
            return rows_rf
        if fused := self.site.fused:
            parts = rows_rf.unflatten(1, (fused.groups, -1)).split(fused.widths, dim=2)
            rows_rf = torch.cat([part.flatten(1) for part in parts], dim=1)
        return rows_rf.t()

    def as_rows(self, value: Tensor) -> Tensor:
        """Return what PEFT has as rows."""
        if self.is_vector:
            return value.unsqueeze(0)
        if self.side == "inputs":
            return value
        if fused := self.site.fused:
            parts = value.split([fused.groups * width for width in fused.widths])
            grouped = [part.unflatten(0, (fused.groups, -1)) for part in parts]
            value = torch.cat(grouped, dim=1).flatten(0, 1)
        return value.t()

    def cut(self, rows_rf: Tensor, shard: Shard) -> Tensor:
        """Return a view of the columns that belong to a shard of the linear."""
        if self.side == "ranks":
            return rows_rf
        columns = shard.inputs if self.side == "inputs" else shard.outputs
        return rows_rf[:, columns.start : columns.stop]

    def start(self) -> Tensor:
        """Return the rows that training starts from: fp32, on the CPU, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        rows_rf = torch.empty(self.num_rows, self.num_columns)
        return rows_rf.uniform_(-self.bound, self.bound, generator=generator).add_(self.center)


@dataclass(frozen=True)
class AdapterSpec:
    """One task's adapter: what PEFT's LoraConfig says, reduced to what we support.

    Attributes
    ----------
    name
        The task's.
    rank, alpha
        Of every site that no pattern names.
    target_modules
        The linears of every layer that it is on.
    dropout
        Probability that a feature of a linear's input drops out before A.
    seed
        Of its first values.
    kind
        The variant, as task files name it.
    rank_pattern, alpha_pattern
        (pattern, value), the first that fits counts: as PEFT reads them, a pattern is a regular
        expression that matches the end of a site's path, whole components.
    loraplus_ratio
        B learns at so many times the rate of A (LoRA+, arXiv 2402.12354); so do all vectors.
    projection_seed
        Of VeRA's frozen matrices.
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    seed: int = 0
    kind: str = "lora"
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    loraplus_ratio: float = 1.0
    projection_seed: int = 0

    def rank_at(self, site: Site) -> int:
        """Return the rank at a site."""
        return int(matched(self.rank_pattern, site.path, self.rank))

    @property
    def largest_rank(self) -> int:
        """Return the largest rank of any site."""
        return int(max([self.rank, *(value for _, value in self.rank_pattern)]))

    def scaling(self, site: Site) -> float:
        """Return the factor of the low-rank update at a site.

        It is alpha / rank (LoRA, arXiv 2106.09685), of rank-stabilised LoRA alpha / sqrt(rank)
        (arXiv 2312.03732).
        """
        alpha, rank = matched(self.alpha_pattern, site.path, self.alpha), self.rank_at(site)
        return alpha / (math.sqrt(rank) if self.kind == "rslora" else rank)

    def projections(self, shape: ModelShape) -> Projections:
        """Return VeRA's frozen matrices for a model."""
        return Projections.drawn(self.rank, self.target_modules, shape, self.projection_seed)

    def problems(self, shape: ModelShape) -> list[str]:
        """Return what of the adapter a model is not made for: field and reason."""
        own = [site for site in sites(shape) if site.module in self.target_modules]
        found = [
            f"{field}: {pattern!r} fits no linear that the adapter is on"
            for field in ("rank_pattern", "alpha_pattern")
            for pattern, value in getattr(self, field)
            if not any(matched(((pattern, value),), site.path, None) for site in own)
        ]
        if self.kind not in ("lora", "rslora") and any(site.fused for site in own):
            found.append(
                f"adapter: {self.kind} is not supported on linears that hold several projections, "
                f"such as {next(site.module for site in own if site.fused)} of {shape.name}; want "
                f"lora or rslora"
            )
        if self.kind == "pissa" and shape.quantised:
            found.append(
                f"adapter: pissa starts from the weights themselves, not from a base in "
                f"{shape.quantised}: want another kind of adapter, or a base that is not quantised"
            )
        if self.kind == "pissa":
            most = min(min(site.in_features, site.out_features) for site in own)
            if self.largest_rank > most:
                found.append(
                    f"rank: {self.largest_rank} is more than a weight of the model has principal "
                    f"components: at most {most} with adapter: pissa"
                )
        return found

    def key(self, site: Site) -> int:
        """Return a 63-bit number unique to the adapter's seed and name and the site."""
        text = f"{self.seed}/{self.name}/{site.layer}/{site.module}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def tensors(self, site: Site) -> tuple[AdapterTensor, ...]:
        """Return the adapter's tensors at a site: A, B and what more there is, or none at all.

        A starts as PEFT's `kaiming_uniform_(a=sqrt(5))`, that is uniform within
        1 / sqrt(in_features); B starts at zero. DoRA's magnitudes and all of PiSSA start from the
        base's weights: that is `lobra.trainer.first_values`.
        """
        if site.module not in self.target_modules:
            return ()
        name, seed, rank = peft_name(site.layer, site.module), self.key(site), self.rank_at(site)
        bound, ratio = 1.0 / math.sqrt(site.in_features), self.loraplus_ratio
        if self.kind == "vera":
            d, b = f"{name}.vera_lambda_d", f"{name}.vera_lambda_b"
            return (
                AdapterTensor(d, site, "ranks", rank, 0.0, seed, ratio, True, VERA_D),
                AdapterTensor(b, site, "outputs", 1, 0.0, seed, ratio, True),
            )
        factors = (
            AdapterTensor(f"{name}.lora_A.weight", site, "inputs", rank, bound, seed),
            AdapterTensor(f"{name}.lora_B.weight", site, "outputs", rank, 0.0, seed, ratio),
        )
        if self.kind != "dora":
            return factors
        vector = f"{name}.lora_magnitude_vector"
        return (*factors, AdapterTensor(vector, site, "outputs", 1, 0.0, seed, ratio, True))


def matched(pattern: Pattern, path: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that fits a linear's path, as PEFT reads patterns."""
    fitting = (value for key, value in pattern if re.match(rf"(.*\.)?({key})$", path))
    return next(fitting, otherwise)


def peft_name(layer: int, module: str) -> str:
    """Return the name PEFT gives the adapter of a module (without `.lora_A.weight`)."""
    return f"base_model.model.model.layers.{layer}.{module_path(module)}"


def sites(shape: ModelShape) -> list[Site]:
    """Return the linears of all layers of a model."""
    layers = range(shape.num_layers)
    return [site for layer in layers for own in sites_by_input(shape, layer) for site in own]


@dataclass(frozen=True)
class FlatTensors:
    """An adapter's tensors in consecutive layers, end to end in one flat tensor.

    Layer by layer; in a layer, those of linears that share an input lie together, A before B.
    """

    tensors: tuple[AdapterTensor, ...]

    @classmethod
    def of_layers(cls, spec: AdapterSpec, shape: ModelShape, layers: range) -> FlatTensors:
        """Return the tensors of these layers of a model."""
        return cls(tuple(_in_order(spec, shape, layers)))

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each tensor lies, by its name."""
        places, start = {}, 0
        for tensor in self.tensors:
            places[tensor.name] = slice(start, start + tensor.numel)
            start += tensor.numel
        return places

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


def sites_by_input(shape: ModelShape, layer: int) -> Iterator[list[Site]]:
    """Yield a layer's linears, those that share an input together."""
    sizes, fused = shape.linear_sizes(), shape.fused_linears()
    whole = {part: name for name, linear in fused.items() for part in linear.parts}
    for modules in SHARED_INPUTS:
        own = dict.fromkeys(whole.get(module, module) for module in modules)
        yield [Site(layer, module, *sizes[module], fused.get(module)) for module in own]


def _in_order(spec: AdapterSpec, shape: ModelShape, layers: range) -> Iterator[AdapterTensor]:
    for layer in layers:
        for sites in sites_by_input(shape, layer):
            tensors = [tensor for site in sites for tensor in spec.tensors(site)]
            yield from sorted(tensors, key=lambda tensor: tensor.side)  # a stable sort
