"""The benchmarks behind the dated pages of `docs/results`: `python -m benchmarks SUBJECT ...`.

A subject is a module with a driver of the same name: a typed function whose parameters are the
command's options and which yields a row, its values by column, as soon as it is measured. Rows are
printed as Markdown tables, with what the machine was doing beside them. To add a subject, write its
driver and enter it here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.failed import Failed
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.profiler.hardware import cpu_name, num_cores

# Before torch is imported. One thread, unless the environment says otherwise: the ranks of the
# subjects that have some share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SUBJECTS = {
    "adapted_linear": "linears with the adapters of several tasks: both stacks against plain torch",
    "equality": "adapters trained jointly by us, against PEFT's trained alone",
    "loss_memory": "peak memory and time of the loss, whole and in chunks",
    "planning": "the planners' times and certified gaps",
    "profiler_cost": "how few rows of a time profile suffice",
    "profiler_deployments": "the memory estimator, against the layouts LobRA deployed",
    "profiler_step_time": "predicted against measured step times of training on this machine",
    "trainer_overhead": "how much of a step is not computing",
}

Row = Mapping[str, Any]


def main(words: Sequence[str]) -> int:
    """Run the subject that the words of a command line ask for; return 0, 1 or 2."""
    app = App(
        name="python -m benchmarks",
        help="The measurements behind the dated pages of docs/results.",
        default_parameter=Parameter(negative=()),
        version_flags=(),
    )
    for subject, line in SUBJECTS.items():
        asked = subject in words[:1]  # whose own help then tells more
        app.command(f"benchmarks.{subject}:{subject}", name=subject, help=None if asked else line)

    @app.meta.default
    def measure(
        *subject: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    ) -> None:
        """Measure, print, and keep the rows.

        Parameters
        ----------
        json_file
            Where to write the rows too, with the command and the machine.
        """
        driver, given, _ = app.parse_args(subject)
        about = {"command": " ".join(subject), **machine()}
        rows = []
        for row in printed(driver(*given.args, **given.kwargs) or ()):
            rows.append(row)
            about["load_after"] = round(os.getloadavg()[0], 1)
            if json_file is not None:  # after every row: whatever ends the measurement
                write_atomic(json_file, json.dumps(about | {"rows": rows}, indent=2) + "\n")
        print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))

    try:
        app.meta(words, result_action="return_value")
    except ConfigError as error:
        print(f"{words[0]}: {error}", file=sys.stderr)
        return 2
    except Failed as failure:
        print(f"{words[0]}: {failure}", file=sys.stderr)
        return 1
    return 0


def machine() -> dict[str, Any]:
    """Return the date, what is computed with, and what else the machine is doing."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "cores": num_cores(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "load_before": round(os.getloadavg()[0], 1),
    }


def printed(rows: Iterable[Row]) -> Iterator[Row]:
    """Print rows as they come, a new table where the columns change, and pass them on."""
    columns: tuple[str, ...] = ()
    for row in rows:
        if tuple(row) != columns:
            columns = tuple(row)
            print("", _line(columns), _line(["---"] * len(columns)), sep="\n")
        print(_line(row.values()), flush=True)
        yield row


def _line(values: Iterable[Any]) -> str:
    cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
