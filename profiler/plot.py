"""The plot of `lobra profile fit`: measured and predicted times, and errors, per tp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lobra.common.errors import ConfigError
from lobra.common.files import atomic_path
from lobra.profiler.layer_fit import fit_layer
from lobra.profiler.profiles import TimeProfile
from lobra.profiler.validation import SuspiciousRow, Validation

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(validations)
    figure, axes = pyplot.subplots(
        2, columns, figsize=(3.6 * columns + 0.6, 6), sharex="col", sharey="row", squeeze=False
    )
    for column, validation in enumerate(validations):
        rows = validation.rows
        b = profile.mbs[rows].astype(float)
        s = profile.seq_len[rows].astype(float)
        tokens, time_ms = b * s, profile.time_ms[rows]
        fit = fit_layer(b, s, time_ms, validation.kind)
        above, below = axes[0][column], axes[1][column]
        marks = {(row.b, row.s) for row in suspicious if row.tp == validation.tp}
        circled = np.array([(int(x), int(y)) in marks for x, y in zip(b, s, strict=True)])
        for axis, values in ((above, 1e3 * time_ms / tokens), (below, 100 * validation.error)):
            axis.scatter(tokens, values, s=14, color="tab:blue")
            axis.scatter(
                tokens[circled], values[circled], s=90, facecolors="none", edgecolors="tab:red"
            )
            axis.grid(alpha=0.3)
        grid = np.geomspace(tokens.min(), tokens.max(), 200)
        lengths = np.minimum(grid, LENGTH_SHOWN)
        curve = fit.time_ms(grid / lengths, lengths)
        above.plot(grid, 1e3 * curve / grid, color="tab:orange", label="cost model")
        above.set(title=f"tp {validation.tp}", xscale="log", yscale="log")
        below.axhline(0.0, color="tab:orange")
        below.set(xlabel="tokens of the micro-batch")
    axes[0][0].set(ylabel="us per token and layer")
    axes[1][0].set(ylabel="error on held-out rows, %")
    axes[0][0].legend()
    figure.tight_layout()
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"plot {path}: cannot be written ({error})") from error
    finally:
        pyplot.close(figure)
