"""The picture of `lobra profile fit`: measured and predicted times, and errors, per tp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.layer_fit import fit_layer
from lobra.profiler.profiles import TimeProfile
from lobra.profiler.validation import SuspiciousRow, Validation
from lobra.report.style import BLACK, OURS, VERMILLION, draw, explain, make_figure, plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH_SHOWN = 1024  # tokens of the sequences the curves are drawn for


def plot_fit(
    profile: TimeProfile,
    validations: Sequence[Validation],
    suspicious: Sequence[SuspiciousRow],
    path: Path,
) -> None:
    """Save a PNG: above, time per token against tokens; below, the error on held-out rows.

    Suspicious rows are circled.

    Raises
    ------
    ConfigError
        If there is no writing at that path.
    """
    try:
        draw(path, partial(_picture, profile, validations, suspicious), "png")
    except OSError as error:
        raise ConfigError(f"plot {path}: cannot be written ({error})") from error


def _picture(
    profile: TimeProfile, validations: Sequence[Validation], suspicious: Sequence[SuspiciousRow]
) -> Figure:
    columns = len(validations)
    figure = make_figure(2.6 * columns + 1.0, 5.4)
    panels = figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)
    for validation, (above, below) in zip(validations, panels.T, strict=True):
        rows = validation.rows
        b = profile.mbs[rows].astype(float)
        s = profile.seq_len[rows].astype(float)
        tokens, time_ms = b * s, profile.time_ms[rows]
        fit = fit_layer(b, s, time_ms, validation.kind)
        marks = {(row.b, row.s) for row in suspicious if row.tp == validation.tp}
        circled = np.array([(int(x), int(y)) in marks for x, y in zip(b, s, strict=True)])
        for axes, values in ((above, 1e3 * time_ms / tokens), (below, 100 * validation.error)):
            axes.scatter(tokens, values, s=12, color=OURS, label="measured")
            if circled.any():
                axes.scatter(
                    tokens[circled], values[circled], s=90, facecolors="none", edgecolors=BLACK,
                    label="suspicious",
                )  # fmt: skip
        grid = np.geomspace(tokens.min(), tokens.max(), 200)
        lengths = np.minimum(grid, LENGTH_SHOWN)
        curve = 1e3 * fit.time_ms(grid / lengths, lengths) / grid
        label = f"cost model, sequences of {LENGTH_SHOWN} tokens"
        above.plot(grid, curve, color=VERMILLION, label=label)
        above.set(title=f"tp {validation.tp}", xscale="log", yscale="log")
        below.axhline(0.0, color=VERMILLION)
        plain_ticks(above.yaxis)
        plain_ticks(below.xaxis)
    figure.supxlabel("tokens of the micro-batch", fontsize="medium")
    panels[0][0].set_ylabel("µs per token and layer")
    panels[1][0].set_ylabel("error on held-out rows (%)")
    explain(figure)
    return figure
