"""What a checkpoint holds of a weight in bitsandbytes' format, and under which names.

In nf4 a weight is bytes of two values each. Beside it lie its blocks' scales, in 8 bits with scales
of their own or in fp32, and a text that says what it was. In int8 a weight has its own shape, and
beside it lie the scales of its rows, and a number that says how its values are arranged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from torch import Tensor

from lobra.common.documents import parse_json
from lobra.common.errors import ConfigError, Problems
from lobra.common.models import FileModel, Number, PositiveInt, Wanted, read_as
from lobra.layout.base_precision import NF4_BLOCK, SCALE_BLOCK

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
ROW_SCALES, ARRANGEMENT = "SCB", "weight_format"

#: Of a tensor: its shape, and its dtype as safetensors names it.
Header = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Nf4State(FileModel):
    """What a checkpoint says of a weight in nf4; what else it says there is not needed.

    `nested_offset` was taken from the blocks' scales before these were brought to 8 bits; without
    it they are in fp32.
    """

    __pydantic_config__ = ConfigDict(extra="ignore")

    shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    blocksize: Annotated[int, Field(ge=NF4_BLOCK, le=NF4_BLOCK), Wanted(str(NF4_BLOCK))]
    nested_blocksize: Annotated[
        int, Field(ge=SCALE_BLOCK, le=SCALE_BLOCK), Wanted(str(SCALE_BLOCK))
    ] = SCALE_BLOCK
    nested_offset: Number | None = None

    @classmethod
    def of_tensor(cls, tensor: Tensor, where: str) -> Nf4State:
        """Return what the bytes of a tensor say.

        Raises
        ------
        ConfigError
            If that is not what is read; it begins with ``where``.
        """
        problems = Problems()
        try:
            state = read_as(cls, parse_json(bytes(tensor.tolist()).decode()), problems)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        problems.prefixed(f"{where}: ").raise_if_any()
        assert state is not None
        return state


def quantised_weight_of(name: str) -> str | None:
    """Return the name of the quantised weight that a tensor tells of, None if of none."""
    linear, _, part = name.partition(".weight.")
    if part:
        return f"{linear}.weight"
    linear, _, part = name.rpartition(".")
    return f"{linear}.weight" if part in (ROW_SCALES, ARRANGEMENT) else None


def as_unquantised(
    headers: Mapping[str, Header],
    quantised: str | None,
    folder: Path,
    read: Callable[[str], Tensor],
) -> dict[str, Header]:
    """Return a checkpoint's headers as they would be had its weights not been quantised so.

    Parameters
    ----------
    headers
        As they are, by name.
    quantised
        What weights are expected to be in, int8 or nf4; others stay as they are.
    folder
        Where the checkpoint is.
    read
        Returns a tensor of it.

    Raises
    ------
    ConfigError
        If weights are quantised in a way that is not read.
    """
    plain: dict[str, Header] = {}
    problems = Problems()
    for name, header in headers.items():
        weight = quantised_weight_of(name)
        if weight is None:
            plain.setdefault(name, header)
        elif name.endswith(NF4_STATE) and quantised == "nf4":
            with problems.noted():
                state = Nf4State.of_tensor(read(name), f"{folder}: tensor {name!r}")
                plain[weight] = tuple(state.shape), "F32"
        elif name.endswith(ROW_SCALES) and quantised == "int8" and weight in headers:
            plain[weight] = headers[weight][0], "F32"
        elif name.endswith(ARRANGEMENT) and bool(read(name).any()):
            problems.add(
                f"{folder}: {weight!r} is arranged for some processors only: write it anew with a "
                f"newer bitsandbytes"
            )
    problems.raise_if_any()
    return plain
