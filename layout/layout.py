"""A layout: how many GPUs one replica splits each layer over, and into how many stages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lobra.common.errors import ConfigError


@dataclass(frozen=True, order=True)
class Layout:
    """A parallel configuration ``<tp,pp>``, ordered by tp, then pp.

    Attributes
    ----------
    tp
        Tensor-parallel size: GPUs that share one layer.
    pp
        Pipeline size: number of stages the layers are divided into.

    Raises
    ------
    ConfigError
        If either size is not a positive integer.
    """

    tp: int
    pp: int

    def __post_init__(self) -> None:
        for name, value in (("tp", self.tp), ("pp", self.pp)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"layout: {name}: {value!r} is not a positive integer")

    @property
    def num_gpus(self) -> int:
        """GPUs one replica of this layout occupies."""
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"<{self.tp},{self.pp}>"


def parse_layout(text: str) -> Layout:
    """Return the layout written as ``<2,1>`` or ``2,1``.

    Raises
    ------
    ConfigError
        If the text is neither.
    """
    match = re.fullmatch(r"\s*<?\s*(\d+)\s*,\s*(\d+)\s*>?\s*", text)
    if match is None:
        raise ConfigError(f"layout {text!r}: write it as <tp,pp>, for example <2,1>")
    return Layout(int(match[1]), int(match[2]))
