"""The cost model: what layers, micro-batches and a step's synchronisation cost, from profiles."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError, Problems
from lobra.layout.layout import Layout
from lobra.profiler import lookup
from lobra.profiler.collectives import Collectives, default_collectives_path, load_collectives
from lobra.profiler.head import HeadFit, HeadProfile, fit_heads, load_head_profile
from lobra.profiler.layer_fit import KINDS, Kind, LayerFit, fit_layer
from lobra.profiler.profiles import (
    DEFAULT_POLICY,
    TimeProfile,
    default_head_path,
    default_time_path,
    load_time_profiles,
    no_use,
    num_layers_of,
)
from lobra.profiler.sidecar import read_meta

#: Of a layer's time, what its forward pass without adapters takes, by memory policy. One of two
#: products with each frozen weight would be half, one of three a third; measured on a CPU, with
#: hidden size 512 and adapters of rank 8, were 0.39, 0.34 and 0.31.
FORWARD_SHARE = {"keep": 0.4, "lean": 0.35, "full": 0.3}
LOGITS_SHARE = 0.6  # of the head's time, the logits' with their softmax; 0.8 were measured there


@dataclass(frozen=True, eq=False)
class MicroBatchTime:
    """How long micro-batches keep the slowest stage of a pipeline busy: float64 arrays, in ms.

    Attributes
    ----------
    layers_ms
        The stage's layers, forward and backward; the forward pass twice if it is computed again.
    head_ms
        Embedding and head; 0 where they were not profiled.
    transfer_ms
        Hidden states handed on and their gradients back; 0 without a pipeline, or a profile.
    """

    layers_ms: np.ndarray
    head_ms: np.ndarray
    transfer_ms: np.ndarray

    @property
    def total_ms(self) -> np.ndarray:
        """The sum of the parts."""
        return self.layers_ms + self.head_ms + self.transfer_ms


def padded_work(
    num_sequences: np.ndarray | int, length: np.ndarray | int
) -> tuple[np.ndarray | int, np.ndarray | int]:
    """Return tokens and squares of micro-batches of so many sequences padded to one length."""
    tokens = num_sequences * length
    return tokens, tokens * length


def equal_rows(
    tokens: np.ndarray | int, squares: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Return b and s, float64: the b sequences of s tokens each with this work.

    The inverse of `padded_work`, exactly, as long as the squares are below 2^53. Of sequences of
    unequal lengths b and s need not be whole.
    """
    length = np.divide(squares, tokens)
    return np.divide(tokens, length), length


@dataclass(frozen=True)
class TokenShares:
    """What the tokens of a step ask for on average.

    Attributes
    ----------
    labels
        The share of them that carry a loss; None: as in the profile.
    passes_before
        How often they go through the model forward before the pass that learns from them.
    logits_again
        How often the logits of those that carry a loss are computed besides.
    """

    labels: float | None = None
    passes_before: float = 0.0
    logits_again: float = 0.0


@dataclass(frozen=True, eq=False)
class CostModel:
    """Times of micro-batches and of a step's synchronisation for every tensor-parallel size.

    Attributes
    ----------
    num_layers
        Transformer layers of the model.
    kind
        Which fit, see ``LayerFit``.
    layers
        The fit of one layer that keeps all for its backward pass, by tp.
    head
        The fit of embedding and head together, by tp; empty when not profiled.
    meta
        Where the profile comes from.
    collectives
        Transfers and synchronisation; None when not profiled.
    shares
        What the tokens of what is trained ask for.
    adapter_elements
        Parameters of all tasks' adapters together, over all layers; 0 where not known.
    other_layers
        The fits under other memory policies, by policy and tp.
    """

    num_layers: int
    kind: Kind
    layers: Mapping[int, LayerFit]
    head: Mapping[int, HeadFit] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    collectives: Collectives | None = None
    shares: TokenShares = TokenShares()
    adapter_elements: float = 0.0
    other_layers: Mapping[str, Mapping[int, LayerFit]] = field(default_factory=dict)

    def has(self, layout: Layout) -> bool:
        """Return whether there are times of the layout's tp under its memory policy."""
        return layout.tp in self._layers(layout.memory)

    def taking_kept_times(self, memory: str) -> CostModel:
        """Return the cost model with the times of "keep" where those of a policy are missing."""
        other = {**self.other_layers, memory: {**self.layers, **self._layers(memory)}}
        return replace(self, other_layers=other)

    def micro_batch_time(
        self,
        layout: Layout,
        tokens: np.ndarray | int,
        squares: np.ndarray | int,
        labels: np.ndarray | int | None = None,
    ) -> MicroBatchTime:
        """Return how long micro-batches keep the slowest stage of a layout busy, part by part.

        The slowest stage has the layers divided by pp, rounded up. The other arguments, which
        broadcast, are the work of the micro-batches (``layout.sequences.Work``) with the padding
        that is computed. Without ``labels`` they are the share of the tokens that `shares` says.

        Raises
        ------
        ConfigError
            If the layout's tp was not profiled under its memory policy.
        """
        b, s = equal_rows(tokens, squares)
        if not self.has(layout):
            raise ConfigError(self.missing(layout))
        passes = 1.0 + FORWARD_SHARE[layout.memory] * self.shares.passes_before
        layers_ms = passes * self._layers(layout.memory)[layout.tp].time_ms(b, s)
        head_ms = transfer_ms = np.zeros(())
        if layout.tp in self.head:
            share = self.shares.labels if labels is None else labels / np.asarray(tokens)
            times = 1.0 + LOGITS_SHARE * self.shares.logits_again
            head_ms = self.head[layout.tp].time_ms(b, s, share, times)
        if layout.pp > 1 and self.collectives is not None:
            transfer_ms = self.collectives.transfer_ms(tokens) * (1 + self.shares.passes_before / 2)
        return MicroBatchTime(layers_ms * -(-self.num_layers // layout.pp), head_ms, transfer_ms)

    def sync_time_ms(self, num_ranks: int, layers_share: float = 1.0) -> float:
        """Return ms a step spends on synchronising adapters after the last micro-batch.

        ``num_ranks`` hold each layer; ``layers_share`` of the layers are on the rank that holds
        most. Zero where collectives were not profiled (LobRA's cost model has no such term), or
        the adapters are not known (`for_training`).
        """
        if self.collectives is None or not self.adapter_elements:
            return 0.0
        return self.collectives.sync_ms(num_ranks, layers_share * self.adapter_elements)

    def for_training(self, shares: TokenShares, adapter_elements: float) -> CostModel:
        """Return the cost model of what is trained: its tokens, its adapters' size."""
        return replace(self, shares=shares, adapter_elements=float(adapter_elements))

    def missing(self, layout: Layout) -> str:
        """Return what a person is told who asks for times that were not profiled."""
        tp, memory = layout.tp, layout.memory
        of_policy = "" if memory == DEFAULT_POLICY else f" with memory {memory}"
        has = [
            f"tp {', '.join(map(str, sorted(fits)))}"
            + ("" if policy == DEFAULT_POLICY else f" {policy}")
            for policy, fits in ((DEFAULT_POLICY, self.layers), *self.other_layers.items())
            if fits
        ]
        option = "" if memory == DEFAULT_POLICY else f" --memory {memory}"
        return (
            f"time profile {self.meta.get('path', '')}: no rows for tp {tp}{of_policy}; it has "
            f"{'; '.join(has)}. Profile it with `lobra profile time --tp {tp}{option}` "
            f"(scripts/cost_model_benchmark.sh)"
        )

    def _layers(self, memory: str) -> Mapping[int, LayerFit]:
        return self.layers if memory == DEFAULT_POLICY else self.other_layers.get(memory, {})


def fit_cost_model(
    time_profile: TimeProfile,
    num_layers: int,
    kind: Kind = "fitted",
    head_profile: HeadProfile | None = None,
    collectives: Collectives | None = None,
    others: Iterable[TimeProfile] = (),
) -> CostModel:
    """Return the cost model fitted to a profile, each tensor-parallel size for itself.

    ``others`` are the rows of further memory policies; those of ``time_profile`` may be of any.

    Raises
    ------
    ConfigError
        If the kind is unknown, or a tp has too few rows for it (``lobra6`` needs six).
    """
    if kind not in KINDS:
        raise ConfigError(f"cost model {kind!r}: known are {', '.join(KINDS)}")
    meta = {"path": str(time_profile.path or ""), "digest": time_profile.digest}
    head = fit_heads(head_profile) if head_profile is not None else {}
    fits = {one.memory: _fit_all(one, kind) for one in (time_profile, *others)}
    layers = fits.pop(DEFAULT_POLICY, {})
    return CostModel(num_layers, kind, layers, head, meta, collectives, other_layers=fits)


def _fit_all(profile: TimeProfile, kind: Kind) -> dict[int, LayerFit]:
    fits, problems = {}, []
    for tp in profile.tps:
        rows = profile.tp == tp
        b = profile.mbs[rows].astype(np.float64)
        s = profile.seq_len[rows].astype(np.float64)
        try:
            fits[tp] = fit_layer(b, s, profile.time_ms[rows], kind)
        except ConfigError as error:
            problems.append(f"{profile.path or 'time profile'}: tp {tp}: {error}")
    if problems:
        raise ConfigError(problems)
    return fits


def paths_beside(model: str, time_path: Path) -> tuple[Path, Path]:
    """Return where the profiles of embedding and head, and of collectives, lie beside a layer's."""
    if time_path == default_time_path(model):
        return default_head_path(model), default_collectives_path(model)
    names = f"head_{time_path.name}", f"links_{time_path.name}"
    return time_path.with_name(names[0]), time_path.with_name(names[1])


def _check_origins(time_path: Path, other_path: Path) -> None:
    """Refuse profiles to be used together if their sidecars say that they are of two machines."""
    times, other = read_meta(time_path), read_meta(other_path)
    if not times or not other:
        return
    (kind, hardware), (other_kind, other_hardware) = map(_origin, (times, other))
    same = hardware == other_hardware or not hardware or not other_hardware
    if kind == other_kind and same:
        return
    raise ConfigError(
        f"{time_path} is {kind}{hardware and f' on {hardware}'}, but {other_path} beside it is "
        f"{other_kind}{other_hardware and f' on {other_hardware}'}: remove the latter with its "
        f"sidecar, or make it anew where the times are of"
    )


def _origin(meta: Mapping[str, Any]) -> tuple[str, str]:
    """Return "estimated" or "measured", and the name of the hardware ("" if not recorded)."""
    kind = "estimated" if meta.get("kind", "").startswith("estimated") else "measured"
    hardware = meta.get("environment", {}).get("hardware", {})
    return kind, str(hardware.get("name") or "")


def load_cost_model(
    model: str,
    time_path: str | os.PathLike[str] | None = None,
    kind: Kind = "fitted",
) -> CostModel:
    """Return the cost model of a model (``tiny``, ``7B``, ... or a folder) from its profiles.

    Without ``time_path`` the model's own profile is read, else LobRA's (`lookup.time_path`). The
    profiles of embedding and head and of collectives are taken from where `lobra profile time`
    writes them beside that one (``profile_head_<model>.csv``, or ``head_<name>`` for an
    ``--output`` of one's own), where there are any.

    Raises
    ------
    ConfigError
        If the model is unknown, a profile is missing or has mistakes, or one beside the times is
        not of what they are of.
    """
    path = lookup.time_path(model) if time_path is None else Path(time_path)
    if not os.path.exists(path):
        raise ConfigError(lookup.no_time_profile(model, path))
    head_path, collectives_path = paths_beside(model, path)
    for beside in (head_path, collectives_path):
        if os.path.isfile(beside):
            _check_origins(path, beside)
    head = load_head_profile(head_path) if os.path.isfile(head_path) else None
    collectives = load_collectives(collectives_path) if os.path.isfile(collectives_path) else None
    profile, *others = load_time_profiles(path).values()
    Problems(text for own in (profile, *others) for text in no_use(own)).raise_if_any()
    return fit_cost_model(profile, num_layers_of(model), kind, head, collectives, others)
