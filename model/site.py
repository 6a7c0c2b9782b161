"""Where in a model adapters may be: linears of the layers, embedding and head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lobra.layout.shapes import FusedLinear, ModelShape, module_path
from lobra.tasks.target_modules import EMBEDDING, HEAD

if TYPE_CHECKING:
    from torch import Tensor

#: (Pattern, value), the first that fits counts: see `matched`.
Pattern = tuple[tuple[str, float], ...]

# The linears of a decoder layer by the input they have in common.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
PEFT_PREFIX = "base_model.model."  # of the name of every tensor of an adapter


@dataclass(frozen=True)
class Site:
    """A linear layer of the base model, where adapters may be; of a fused one, its parts.

    The embedding is one too, from the vocabulary to its features, in layer -1; the head is in the
    layer after the last.
    """

    layer: int
    module: str
    in_features: int
    out_features: int
    fused: FusedLinear | None = None

    @property
    def path(self) -> str:
        """Where it is in the base model."""
        outside = {EMBEDDING: f"model.{EMBEDDING}", HEAD: HEAD}
        return outside.get(self.module, f"model.layers.{self.layer}.{module_path(self.module)}")

    def grouped(self, rows_rO: Tensor) -> Tensor:
        """Return rows with a column an output feature, part by part, as they lie here.

        Those of a fused linear lie group by group (`FusedLinear`).
        """
        if not self.fused:
            return rows_rO
        import torch  # only where it is there already: who plans does without

        sizes = [self.fused.groups * width for width in self.fused.widths]
        parts = [part.unflatten(1, (self.fused.groups, -1)) for part in rows_rO.split(sizes, dim=1)]
        return torch.cat(parts, dim=2).flatten(1)

    def part_by_part(self, rows_rO: Tensor) -> Tensor:
        """Return what `grouped` was given."""
        if not self.fused:
            return rows_rO
        import torch

        parts = rows_rO.unflatten(1, (self.fused.groups, -1)).split(self.fused.widths, dim=2)
        return torch.cat([part.flatten(1) for part in parts], dim=1)


def sites(shape: ModelShape) -> list[Site]:
    """Return all sites of a model."""
    return [
        site
        for layer in shape.adapted_layers
        for own in sites_by_input(shape, layer)
        for site in own
    ]


def sites_by_input(shape: ModelShape, layer: int) -> Iterator[list[Site]]:
    """Yield a layer's linears, those that share an input together; outside, embedding or head."""
    sizes, fused = shape.module_sizes(), shape.fused_linears()
    if layer not in range(shape.num_layers):
        module = EMBEDDING if layer < 0 else HEAD
        yield [Site(layer, module, *sizes[module])]
        return
    whole = {part: name for name, linear in fused.items() for part in linear.parts}
    for modules in SHARED_INPUTS:
        own = dict.fromkeys(whole.get(module, module) for module in modules)
        yield [Site(layer, module, *sizes[module], fused.get(module)) for module in own]


def matched(pattern: Pattern, path: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that fits a module's path, as PEFT reads patterns."""
    fitting = (value for key, value in pattern if re.match(rf"(.*\.)?({key})$", path))
    return next(fitting, otherwise)
