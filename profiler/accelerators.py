"""The table of accelerators and runtimes behind the estimator (`accelerators.yaml`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError

FLAGS = (
    "sequence_parallel",
    "adapters_sharded",
    "loss_in_chunks",
    "keeps_elementwise",
    "starts_ahead",
)
SHARES = ("matmul", "attention", "memory", "link", "network")
DEFAULT_RUNTIME = "deepspeed"
BUILT_IN = Path(__file__).with_name("accelerators.yaml")


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, and ms a layer and a collective take to start.

    With ``starts_ahead`` a layer starts while the device works: it takes the longer of
    both, and attention on top.
    """

    matmul: float
    attention: float
    memory: float
    link: float
    network: float
    start_ms: float
    collective_start_ms: float
    starts_ahead: bool = False


@dataclass(frozen=True)
class Accelerator:
    """A device's figures; see the comments of `accelerators.yaml` for units."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    efficiency: Efficiency
    devices: tuple[str, ...] = ()
    fp8_tflops: float | None = None
    name: str = ""

    @property
    def memory_bytes(self) -> int:
        """Return the size of its memory in bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def figures(self) -> dict[str, Any]:
        """Return what the maker says; not `devices`, by which it is found only."""
        apart = ("devices", "efficiency")
        return {name: value for name, value in vars(self).items() if name not in apart}

    def flops_per_ms(self, precision: str) -> float:
        """Return the peak of "fp8", "bf16" or "fp32" matrix products.

        Raises
        ------
        ConfigError
            If it has none in fp8.
        """
        tflops = {"fp8": self.fp8_tflops, "bf16": self.bf16_tflops}.get(precision, self.fp32_tflops)
        if tflops is None:
            raise ConfigError(
                f"accelerator {self.name}: has no products in fp8 (no fp8_tflops); give "
                f"--base-precision int8, which takes as little memory"
            )
        return 1e9 * tflops


@dataclass(frozen=True)
class Runtime:
    """How a runtime keeps activations, adapters and logits."""

    sequence_parallel: bool
    adapters_sharded: bool
    loss_in_chunks: bool
    activation_factor: float
    keeps_elementwise: bool = False
    name: str = ""


@dataclass(frozen=True, eq=False)
class Tables:
    """Everything of the file."""

    accelerators: Mapping[str, Accelerator]
    runtimes: Mapping[str, Runtime]

    def accelerator(self, name: str) -> Accelerator:
        """Return an accelerator by name, or by the beginning that only its name has.

        Case does not matter. ConfigError if there is none or several.
        """
        begun = [known for known in self.accelerators if known.lower().startswith(name.lower())]
        return _named(self.accelerators, begun[0] if len(begun) == 1 else name, "accelerator")

    def peak_flops_per_s(self, device: str, precision: str) -> float | None:
        """Return the peak of a GPU by torch's name of it; None where it is not known."""
        known = (a for a in self.accelerators.values() if device in a.devices)
        accelerator = next(known, None)
        if accelerator is None or precision not in ("bf16", "fp32"):
            return None
        return 1e3 * accelerator.flops_per_ms(precision)

    def runtime(self, name: str | None) -> Runtime:
        """Return a runtime by name (None: this project's); ConfigError if unknown."""
        return _named(self.runtimes, name or DEFAULT_RUNTIME, "runtime")


T = TypeVar("T")


def _named(table: Mapping[str, T], name: str, what: str) -> T:
    for known, entry in table.items():
        if known.lower() == name.lower():
            return entry
    raise ConfigError(
        f"{what} {name!r}: known are {', '.join(table)}; describe others in a file like "
        f"profiler/accelerators.yaml and pass it with --accelerators"
    )


def load_tables(path: str | os.PathLike[str] | None = None) -> Tables:
    """Return the built-in tables, with those of a user's file on top.

    Raises
    ------
    ConfigError
        With every mistake of the file.
    """
    raw = _read(BUILT_IN)
    assumed = Efficiency(**raw["efficiency"])  # for the accelerators, if the user's has mistakes
    if path is not None:
        own = _read(Path(path))
        for accelerator in raw["accelerators"].values():  # what is said of all is said of these
            shares = accelerator.pop("efficiency", {})
            left = {key: shares[key] for key in shares.keys() - own.get("efficiency", {}).keys()}
            accelerator.update({"efficiency": left} if left else {})
        for section, entries in own.items():
            raw[section] = {**raw.get(section, {}), **entries}
    problems: list[str] = []
    where = path or BUILT_IN
    general = _build(Efficiency, raw["efficiency"], f"{where}: efficiency", problems, {}) or assumed
    accelerators = _build_all(
        Accelerator, raw["accelerators"], f"{where}: accelerators", problems, efficiency=general
    )
    runtimes = _build_all(Runtime, raw["runtimes"], f"{where}: runtimes", problems)
    if problems:
        raise ConfigError(problems)
    return Tables(accelerators, runtimes)


def _read(path: Path) -> dict[str, Any]:
    raw = read_document(path)
    sections = ("accelerators", "efficiency", "runtimes")
    if not isinstance(raw, dict) or not all(isinstance(v, dict) for v in raw.values()):
        raise ConfigError(f"{path}: a mapping with {', '.join(sections)} is expected")
    unknown = [name for name in raw if name not in sections]
    if unknown:
        names = ", ".join(map(str, unknown))
        raise ConfigError(f"{path}: {names}: unknown; known are {', '.join(sections)}")
    return raw


def _build_all(
    kind: type[T], entries: Mapping[str, Any], where: str, problems: list[str], **given: Any
) -> dict[str, T]:
    problems += [
        f"{where}: {name!r}: a name is text, not {type(name).__name__}; put it in quotes"
        for name in entries
        if not isinstance(name, str)
    ]
    built = {
        name: _build(kind, values, f"{where}.{name}", problems, {"name": name, **given})
        for name, values in entries.items()
    }
    return {name: entry for name, entry in built.items() if entry is not None}


def _build(
    kind: type[T], values: Any, where: str, problems: list[str], given: Mapping[str, Any]
) -> T | None:
    """Return a dataclass of the values; those of ``given`` where they are left out."""
    wanted = [field.name for field in fields(kind) if field.name != "name"]  # type: ignore[arg-type]
    if not isinstance(values, dict):
        problems.append(f"{where}: a mapping of {', '.join(wanted)} is expected")
        return None
    before = len(problems)
    problems += [
        f"{where}.{key}: unknown; known are {', '.join(wanted)}"
        for key in values
        if key not in wanted
    ]
    defaults = {field.name: field.default for field in fields(kind) if field.default != MISSING}  # type: ignore[arg-type]
    defaults.update(given)
    values = {**defaults, **values}
    for key in wanted:
        value = values.get(key)
        if key in defaults and value is defaults[key]:
            continue
        if key in FLAGS:
            if not isinstance(value, bool):
                problems.append(f"{where}.{key}: {value!r} is not true or false")
        elif key == "efficiency":
            values[key] = _build(Efficiency, value, f"{where}.{key}", problems, vars(defaults[key]))
        elif key == "devices":
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                problems.append(f"{where}.{key}: {value!r} is not a list of names")
            else:
                values[key] = tuple(value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            problems.append(f"{where}.{key}: {value!r} is not a positive number")
        elif value == math.inf:
            problems.append(f"{where}.{key}: {value!r} is not finite")
        elif key in SHARES and value > 1:
            problems.append(f"{where}.{key}: {value!r} is not a share of the peak, at most 1")
    return None if len(problems) > before else kind(**values)
