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

from cyclopts import Parameter

from benchmarks.failed import Failed
from lobra.cli import guarded, make_app, parsed, run
from lobra.common.files import write_atomic
from lobra.profiler.hardware import cpu_name, num_cores, versions

# Before torch is imported. One thread, unless the environment says otherwise: the ranks of the
# subjects that have some share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HELP = "The measurements behind the dated pages of docs/results."
SUBJECTS = {
    "activation_bytes": "what a token and layer keeps for the backward pass, by memory policy",
    "adapted_linear": "linears with the adapters of several tasks, by every way to compute them",
    "baselines": "ours, tensor parallel, FSDP2 and a pipeline as real trainers of one adapter",
    "drift": "a long run, against PEFT alone: losses step by step, adapters at the end",
    "equality": "adapters trained jointly by us, against PEFT's trained alone",
    "live_tasks": "a run whose tasks come and go, planned anew: pauses, and adapters beside PEFT's",
    "loss_memory": "peak memory and time of the loss, whole and in parts",
    "multi_lora": "many adapters: ours, PEFT one after the other, the frozen base alone",
    "packed_parts": "packed attention and LoRA dropout, beside what they replace",
    "planning": "the planners' times and certified gaps",
    "profiler_cost": "how few rows of a time profile suffice",
    "profiler_deployments": "the memory estimator, against the layouts LobRA deployed",
    "profiler_step_time": "predicted against measured step times of training on this machine",
    "quantised_base": "a base in eight and four bits: what ranks hold of it, its errors and time",
    "service_passes": "the service: passes of several tenants, against one tenant a pass",
    "soak": "a long run: whether memory, handles, threads and files stay as they are",
    "trainer_overhead": "how much of a step is not computing",
    "training_run": "profile, train with `lobra`'s own commands, compare with the prediction",
}

Row = Mapping[str, Any]


def main(words: Sequence[str]) -> int:
    """Run the subject that the words of a command line ask for; return 0, 1, 2 or 130."""
    app = make_app(name="python -m benchmarks", help=HELP, version_flags=())
    for subject, line in SUBJECTS.items():
        asked = subject in words[:1]  # whose own help then tells more
        app.command(
            f"benchmarks.{subject}:{subject}",
            name=subject,
            help=None if asked else line,
            version_flags=(),
        )

    @app.meta.default
    def measure(
        *subject: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    ) -> int | None:
        """Measure, print, and keep the rows.

        Parameters
        ----------
        json_file
            Where to write the rows too, with the command and the machine.
        """
        rows = parsed(app, subject)()
        return None if rows is None else keep(rows, " ".join(subject), json_file)

    return guarded(lambda: run(app.meta, words), words[0] if words else "benchmarks")


def keep(rows: Iterable[Row], command: str, json_file: Path | None) -> int:
    """Print rows as they are measured, write them to a file if asked to; return 0, or 1."""
    about = {"command": command, **machine()}
    kept = []
    try:
        for row in printed(rows):
            kept.append(row)
            about["load_after"] = round(os.getloadavg()[0], 1)
            if json_file is not None:  # after every row: whatever ends the measurement
                write_atomic(json_file, json.dumps(about | {"rows": kept}, indent=2) + "\n")
    except Failed as failure:
        print(f"{command}: {failure}", file=sys.stderr)
        return 1
    print("\n" + ", ".join(f"{name} {value}" for name, value in _shown(about).items()))
    return 0


def machine() -> dict[str, Any]:
    """Return the date, what is computed with, and what else the machine is doing."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "cores": num_cores(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "versions": versions(),
        "load_before": round(os.getloadavg()[0], 1),
    }


def printed(rows: Iterable[Row]) -> Iterator[Row]:
    """Print rows as they come, a new table where the columns change, and pass them on.

    Lists and mappings are details, for the file only.
    """
    columns: list[str] = []
    for row in rows:
        shown = _shown(row)
        if list(shown) != columns:
            columns = list(shown)
            print("", _line(columns), _line(["---"] * len(columns)), sep="\n")
        print(_line(map(_cell, shown.values())), flush=True)
        yield row


def _shown(row: Row) -> Row:
    return {name: v for name, v in row.items() if not isinstance(v, list | tuple | dict)}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
