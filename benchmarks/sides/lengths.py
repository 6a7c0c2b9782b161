"""Lengths of real data sets, in tokens; where there are none, lengths like the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lobra.common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PLACES = (ROOT.parent / "shared/lengths/real_12tasks.json", ROOT.parent / "real_12tasks.json")
# The published data set that each is a part of, or is most like.
PUBLISHED = {
    "dolly_3k": "dolly",
    "evol_instruct_code": "evol_instruct",
    "xsum": "xsum",
    "us_bills_115_all": "billsum",
    "cnn_dailymail": "cnn_dailymail",
    "pubmedqa": "PubMedQA",
    "math_cot_adapters": "MathInstruct",
    "metamath_backward": "MetaMathQA",
}
LONGEST, NUM_SYNTHETIC = 16_384, 2_000


@dataclass(frozen=True, eq=False)
class Lengths:
    """Lengths by data set, int64 [n] each, and where they are from."""

    of: Mapping[str, np.ndarray]
    source: str


def find_lengths(names: Sequence[str], path: Path | None = None) -> Lengths:
    """Return the lengths of these data sets: from `path`, a usual place, or synthetic ones.

    Raises
    ------
    ConfigError
        If `path` is not a JSON object that has a list of lengths for every name.
    """
    found = path or next((place for place in PLACES if place.is_file()), None)
    if found is None:
        return _synthetic_lengths(names)
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        return Lengths(
            {name: np.array(content[name], dtype=np.int64) for name in names}, found.name
        )
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--lengths {found}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"--lengths {found}: has no {error}; want {', '.join(names)}") from error


def _synthetic_lengths(names: Sequence[str]) -> Lengths:
    from experiments.published import LENGTHS
    from experiments.synthetic import synthesize

    made = {
        name: synthesize(LENGTHS[PUBLISHED[name]], LONGEST, 0, NUM_SYNTHETIC).lengths
        for name in names
    }
    return Lengths(made, "synthetic, with the published mean, skewness and kurtosis")
