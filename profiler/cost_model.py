"""The cost model: what layers, micro-batches and a step's synchronisation cost, from profiles."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.collectives import Collectives, default_collectives_path, load_collectives
from lobra.profiler.head import HeadFit, HeadProfile, fit_heads, load_head_profile
from lobra.profiler.layer_fit import KINDS, SMALLEST_TIME_MS, Kind, LayerFit, fit_layer
from lobra.profiler.profiles import (
    DEFAULT_POLICY,
    TimeProfile,
    default_head_path,
    default_time_path,
    load_time_profiles,
    num_layers_of,
    read_meta,
)
from lobra.profiler.series import other_series

__all__ = [
    "KINDS",
    "SMALLEST_TIME_MS",
    "CostModel",
    "Kind",
    "LayerFit",
    "fit_cost_model",
    "fit_layer",
    "load_cost_model",
]


@dataclass(frozen=True, eq=False)
class CostModel:
    """Times of layers and micro-batches ("chunks") for every profiled tensor-parallel size.

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
    label_share
        The share of positions that carry a loss in what is trained; None: as in the profile.
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
    label_share: float | None = None
    adapter_elements: float = 0.0
    other_layers: Mapping[str, Mapping[int, LayerFit]] = field(default_factory=dict)

    @property
    def tps(self) -> tuple[int, ...]:
        """The tensor-parallel sizes there are times for that keep all, ascending."""
        return tuple(sorted(self.layers))

    def has(self, tp: int, memory: str = DEFAULT_POLICY) -> bool:
        """Return whether there are times of this tensor-parallel size under a memory policy."""
        return tp in self._layers(memory)

    def taking_kept_times(self, memory: str) -> CostModel:
        """Return the cost model with the times of "keep" where those of a policy are missing."""
        other = {**self.other_layers, memory: {**self.layers, **self._layers(memory)}}
        return replace(self, other_layers=other)

    def layer_time_ms(
        self,
        tp: int,
        b: np.ndarray | int,
        s: np.ndarray | int,
        memory: str = DEFAULT_POLICY,
    ) -> np.ndarray:
        """Return ms of one layer, forward + backward, for ``b`` sequences padded to ``s`` tokens.

        ``b`` and ``s`` broadcast. With ``memory`` "full" the forward pass is in it twice. Raises
        ``ConfigError`` if ``tp`` was not profiled under that policy.
        """
        return self._fit(tp, memory).time_ms(np.asarray(b), np.asarray(s))

    def chunk_time_ms(
        self,
        tp: int,
        pp: int,
        b: np.ndarray | int,
        s: np.ndarray | int,
        memory: str = DEFAULT_POLICY,
    ) -> np.ndarray:
        """Return ms a micro-batch keeps the slowest stage of ``<tp,pp>`` busy.

        Layer time x layers per stage (rounded up where pp does not divide them), plus embedding
        and head where they were profiled, plus, in a pipeline, the transfer of hidden states and
        their gradients where that was. ``b`` and ``s`` broadcast.
        """
        b, s = np.asarray(b), np.asarray(s)
        layers = -(-self.num_layers // pp)
        time_ms = self._fit(tp, memory).time_ms(b, s) * layers
        if tp in self.head:
            time_ms = time_ms + self.head[tp].time_ms(b, s, self.label_share)
        if pp > 1 and self.collectives is not None:
            time_ms = time_ms + self.collectives.transfer_ms(b * s)
        return time_ms

    def sync_time_ms(self, num_ranks: int, layers_share: float = 1.0) -> float:
        """Return ms a step spends on synchronising adapters after the last micro-batch.

        ``num_ranks`` hold each layer; ``layers_share`` of the layers are on the rank that holds
        most. Zero where collectives were not profiled (LobRA's cost model has no such term), or
        the adapters are not known (`for_training`).
        """
        if self.collectives is None or not self.adapter_elements:
            return 0.0
        return self.collectives.sync_ms(num_ranks, layers_share * self.adapter_elements)

    def for_training(self, label_share: float | None, adapter_elements: float) -> CostModel:
        """Return the cost model of what is trained: its share of labels, its adapters' size."""
        return replace(self, label_share=label_share, adapter_elements=float(adapter_elements))

    def relative_error(self, tp: int, b: np.ndarray | int, s: np.ndarray | int) -> np.ndarray:
        """Return the relative spread of rows about ``layer_time_ms`` (arrays broadcast).

        Robust: outliers do not enter it, see ``LayerFit.relative_error``.
        """
        return self._fit(tp).relative_error(np.asarray(b), np.asarray(s))

    def missing(self, tp: int, memory: str = DEFAULT_POLICY) -> str:
        """Return what a person is told who asks for times that were not profiled."""
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

    def _fit(self, tp: int, memory: str = DEFAULT_POLICY) -> LayerFit:
        if not self.has(tp, memory):
            raise ConfigError(self.missing(tp, memory))
        return self._layers(memory)[tp]


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
    series = other_series(profile)
    for tp in profile.tps:
        rows = profile.tp == tp
        b = profile.mbs[rows].astype(np.float64)
        s = profile.seq_len[rows].astype(np.float64)
        others = None if series is None else series[rows]
        try:
            fits[tp] = fit_layer(b, s, profile.time_ms[rows], kind, others)
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

    Without ``time_path`` the profile at the contract's path is read. The profiles of embedding and
    head and of collectives are taken from where `lobra profile time` writes them beside that one
    (``profile_head_<model>.csv``, or ``head_<name>`` for an ``--output`` of one's own), where there
    are any.

    Raises
    ------
    ConfigError
        If the model is unknown, a profile is missing or has mistakes, or one beside the times is
        not of what they are of.
    """
    path = default_time_path(model) if time_path is None else Path(time_path)
    head_path, collectives_path = paths_beside(model, path)
    for beside in (head_path, collectives_path):
        if beside.is_file():
            _check_origins(path, beside)
    head = load_head_profile(head_path) if head_path.is_file() else None
    collectives = load_collectives(collectives_path) if collectives_path.is_file() else None
    first, *others = load_time_profiles(path).values()
    return fit_cost_model(first, num_layers_of(model), kind, head, collectives, others)
