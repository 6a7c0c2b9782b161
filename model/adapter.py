"""One task's adapter: which tensors it has, and what is computed with them.

Everything that is known of an adapter's tensors is said here, in `AdapterSpec.tensors` and
`AdapterSpec.vectors`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from lobra.layout.shapes import ModelShape
from lobra.model.adapter_tensor import AdapterTensor
from lobra.model.base_vectors import base_vectors, is_trained_bias, is_trained_norm
from lobra.model.site import PEFT_PREFIX, Pattern, Site, matched
from lobra.model.vera import Projections
from lobra.tasks.target_modules import EMBEDDING

VERA_D = 0.1  # what d starts at in PEFT; b starts at zero
OF_VARIANCE_ONE = math.sqrt(3.0)  # the bound of a uniform draw


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
        The linears of every layer that it is on, embedding and head.
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
    modules_to_save
        Ends of the paths of norms that are trained as they are.
    bias
        Which of the base's biases are: none, all, or those of its targets (lora_only).
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
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"

    def rank_at(self, site: Site) -> int:
        """Return the rank at a site."""
        return int(matched(self.rank_pattern, site.path, self.rank))

    @property
    def largest_rank(self) -> int:
        """Return the largest rank of any site."""
        return int(max([self.rank, *(value for _, value in self.rank_pattern)]))

    @property
    def trains_base(self) -> bool:
        """Whether vectors of the base are trained as they are."""
        return bool(self.modules_to_save) or self.bias != "none"

    @property
    def starts_from_base(self) -> bool:
        """Whether some of its tensors start from the base's weights."""
        return self.kind in ("pissa", "dora") or self.trains_base

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

    def key(self, site: Site) -> int:
        """Return a 63-bit number unique to the adapter's seed and name and the site."""
        text = f"{self.seed}/{self.name}/{site.layer}/{site.module}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def tensors(self, site: Site) -> tuple[AdapterTensor, ...]:
        """Return the adapter's tensors at a site: A, B and what more there is, or none at all.

        A starts as PEFT's `kaiming_uniform_(a=sqrt(5))`, that is uniform within
        1 / sqrt(in_features); B starts at zero. At the embedding, as in PEFT, A starts at zero and
        B with variance 1. DoRA's magnitudes and all of PiSSA start from the base's weights.
        """
        if site.module not in self.target_modules:
            return ()
        name, seed, rank = PEFT_PREFIX + site.path, self.key(site), self.rank_at(site)
        bound, ratio = 1.0 / math.sqrt(site.in_features), self.loraplus_ratio
        if self.kind == "vera":
            d, b = f"{name}.vera_lambda_d", f"{name}.vera_lambda_b"
            return (
                AdapterTensor(d, site, "ranks", rank, 0.0, seed, ratio, True, VERA_D),
                AdapterTensor(b, site, "outputs", 1, 0.0, seed, ratio, True),
            )
        if site.module == EMBEDDING:
            A, B = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
            return (
                AdapterTensor(A, site, "inputs", rank, 0.0, seed),
                AdapterTensor(B, site, "outputs", rank, OF_VARIANCE_ONE, seed),
            )
        A, B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        starts = self.kind == "pissa"
        factors = (
            AdapterTensor(A, site, "inputs", rank, bound, seed, from_base=starts),
            AdapterTensor(B, site, "outputs", rank, 0.0, seed, ratio, from_base=starts),
        )
        if self.kind != "dora":
            return factors
        vector = f"{name}.lora_magnitude_vector"
        magnitude = AdapterTensor(
            vector, site, "outputs", 1, 0.0, seed, ratio, True, from_base=True
        )
        return *factors, magnitude

    def vectors(self, shape: ModelShape, layer: int) -> list[AdapterTensor]:
        """Return the vectors of a layer of the base that the task trains as they are."""
        if not self.trains_base:
            return []
        found = []
        for name, size in base_vectors(shape)[layer].items():
            path, _, parameter = name.rpartition(".")
            module = path.rpartition(".")[2]
            if not is_trained_norm(self.modules_to_save, name) and not is_trained_bias(
                self.bias, self.target_modules, name
            ):
                continue
            if module in self.target_modules:  # PEFT has put its own module around the linear
                name = f"{path}.base_layer.{parameter}"
            site, ratio = Site(layer, module, size, size), self.loraplus_ratio
            found.append(
                AdapterTensor(
                    PEFT_PREFIX + name, site, "outputs", 1, 0.0, 0, ratio, True, from_base=True
                )
            )
        return found
