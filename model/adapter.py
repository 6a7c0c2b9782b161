"""One task's adapter: which tensors it has, and what is computed with them.

Everything that is known of an adapter's tensors is said here, in `AdapterSpec.tensors` and
`AdapterSpec.vectors`.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

from lobra.layout.shapes import ModelShape
from lobra.model.adapter_tensor import AdapterTensor
from lobra.model.base_vectors import base_vectors, fits
from lobra.model.site import PEFT_PREFIX, Site, sites
from lobra.model.vera import Projections
from lobra.tasks.target_modules import EMBEDDING, HEAD

Pattern = tuple[tuple[str, float], ...]

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

    def problems(self, shape: ModelShape) -> list[str]:
        """Return what of the adapter a model is not made for: field and reason."""
        own = [site for site in sites(shape) if site.module in self.target_modules]
        found = [
            f"{field}: {pattern!r} fits nothing that the adapter is on"
            for field in ("rank_pattern", "alpha_pattern")
            for pattern, value in getattr(self, field)
            if not any(matched(((pattern, value),), site.path, None) for site in own)
        ]
        if EMBEDDING in self.target_modules and self.kind not in ("lora", "rslora"):
            found.append(
                f"adapter: {self.kind} is not supported on {EMBEDDING}; want lora or rslora"
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
            if HEAD in self.target_modules and shape.tied_embeddings:
                found.append(
                    f"adapter: pissa takes its start out of the weight, which {HEAD} and "
                    f"{EMBEDDING} of {shape.name} share: remove {HEAD} from target_modules"
                )
        return [*found, *self._vector_problems(shape)] if self.trains_base else found

    def _vector_problems(self, shape: ModelShape) -> list[str]:
        names = [name for own in base_vectors(shape).values() for name in own]
        found = [
            f"modules_to_save: {key!r} fits no norm of {shape.name}; only norms are trained as "
            f"they are"
            for key in self.modules_to_save
            if not any(fits(key, name) for name in names)
        ]
        if self.bias != "none" and not any(self._trains_bias(name) for name in names):
            found.append(f"bias: {self.bias}, but {shape.name} has no such biases; want none")
        return found

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
            is_norm = any(fits(key, name) for key in self.modules_to_save)
            if not is_norm and not self._trains_bias(name):
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

    def _trains_bias(self, name: str) -> bool:
        """Return whether a vector of the base is a bias that is trained."""
        *_, module, parameter = name.split(".")
        of_target = self.bias == "lora_only" and module in self.target_modules
        return parameter == "bias" and (self.bias == "all" or of_target)


def matched(pattern: Pattern, path: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that fits a module's path, as PEFT reads patterns."""
    fitting = (value for key, value in pattern if re.match(rf"(.*\.)?({key})$", path))
    return next(fitting, otherwise)
