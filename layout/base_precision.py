"""In how many bits the frozen base's linears are kept: the option, and what it asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lobra.common.errors import ConfigError

BasePrecision = Annotated[
    Literal["bf16", "fp8", "int8", "nf4"],
    Parameter(
        help="What the base's linears are kept in: quantised, they leave room for more tokens; by "
        "default as the model folder has them, in the precision of the activations."
    ),
]
FP8, INT8, NF4 = QUANTISED = ("fp8", "int8", "nf4")
_BITS = {NF4: 4, INT8: 8, FP8: 8, None: 16}  # about, of an element
NF4_BLOCK = 64  # consecutive values of a weight that have a scale of their own
SCALE_BLOCK = 256  # consecutive ones of these scales that have a scale of their own
LIBRARY = "bitsandbytes"


def quieten_library() -> None:
    """Keep the library from warning that a product of its own, used nowhere here, lacks a kernel.

    It does so when it is imported.
    """
    logging.getLogger(LIBRARY).setLevel(logging.ERROR)


def stored_precision(config: Any) -> str | None:
    """Return what a folder's `quantization_config` says its linears are kept in.

    Raises
    ------
    ConfigError
        If that is nothing that is read.
    """
    if not config:
        return None
    if isinstance(config, dict) and config.get("quant_method") == LIBRARY:
        if config.get("load_in_8bit"):
            return INT8
        of_bytes = config.get("bnb_4bit_quant_storage") in (None, "uint8")
        if config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4" and of_bytes:
            return NF4
    raise ConfigError(
        f"quantization_config: quantised weights are not read, but for those of {LIBRARY} in int8, "
        f"or in nf4 kept as uint8; use the unquantised model"
    )


def option_problem(base_precision: str | None, precision: str) -> str | None:
    """Return why the option does not go with the precision of the activations, None if it does."""
    if base_precision != "bf16" or precision == "bf16":
        return None
    return (
        f"--base-precision bf16: a base that is not quantised has the precision of activations, "
        f"{precision}: leave it out, or give --precision bf16"
    )


def library_problem(quantised: str | None) -> str | None:
    """Return what is missing here for a base that is kept so, None if nothing is."""
    if quantised != NF4 or find_spec(LIBRARY) is not None:
        return None
    return f"a base in nf4 needs {LIBRARY}: pip install 'lobra[quantised]'"


def takes_more(quantised: str | None, other: str | None) -> bool:
    """Return whether a base that is kept so takes more memory than one that is kept otherwise."""
    return _BITS[quantised] > _BITS[other]


def plan_problem(made_for: str | None, quantised: str | None) -> str | None:
    """Return why a plan's micro-batches may not fit beside the base, None if they may."""
    if not takes_more(quantised, made_for):
        return None
    return (
        f"the plan was made for a base in {made_for}, which leaves more room than this one: give "
        f"--base-precision {made_for}, or plan again with profiles of this one"
    )


def block_problems(
    linear_sizes: Mapping[str, tuple[int, int]], fused: Iterable[str], tp: int
) -> list[str]:
    """Return which weights, by {name: (inputs, outputs)}, nf4's blocks do not fit.

    A GPU takes whole blocks, or parts of them, of single rows; so does the order that the features
    of a ``fused`` linear have here.
    """
    problems = []
    for name, (inputs, outputs) in linear_sizes.items():
        if inputs * outputs % NF4_BLOCK:
            problems.append(f"{name}'s {inputs} x {outputs} values are no whole blocks of nf4")
        elif inputs % NF4_BLOCK and (tp > 1 or name in fused):
            problems.append(f"a row of {name} has {inputs} values, no whole blocks of nf4")
    return problems
