"""`lobra tasks`: tasks join and leave a run while it trains."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lobra.common.errors import ConfigError, MachineError, Problems
from lobra.common.lock import is_held
from lobra.common.options import Json, PositiveNumber, TaskSetName
from lobra.common.words import counted
from lobra.report.run_summary import task_summary
from lobra.tasks.task_file import load_trainer_config
from lobra.trainer.log_parts import log_files
from lobra.trainer.metrics import read_metrics
from lobra.trainer.run_config import read_run_config
from lobra.trainer.run_spec import LOCK_FILE
from lobra.trainer.task_file_watch import request_to_join
from lobra.trainer.task_requests import TaskRequest, answer_to, send, waiting, withdraw

Run = Annotated[Path, Parameter(help="The run's folder.")]
Patience = Annotated[
    PositiveNumber, Parameter(help="Seconds to wait for the run's answers.", metavar="S")
]
PATIENCE_S = 600.0


def add(run: Run, file: TaskSetName, /, *, timeout: Patience = PATIENCE_S) -> int:
    """Have the tasks of a file join a run between two of its steps.

    Each is checked as at a start, its data and memory too, and joins or is refused; ends with 2 if
    one is. Paths in the file are looked for where the run was started.

      lobra tasks add runs/a new_tasks.yaml
    """
    read_run_config(run)
    tasks = load_trainer_config(file).tasks
    return _ask(run, [request_to_join(task) for task in tasks], timeout, "joins")


def cancel(run: Run, name: str, /, *more: str, timeout: Patience = PATIENCE_S) -> int:
    """Have tasks leave a run: each is exported as it is, and its memory is free for others.

    Parameters
    ----------
    name
        A task.
    more
        Further tasks.
    """
    read_run_config(run)
    return _ask(run, [TaskRequest(each) for each in (name, *more)], timeout, "leaves")


def show(run: Run, /, *, json_output: Annotated[Json, Parameter(name="--json")] = False) -> int:
    """List the tasks that a run has, or had, and what is asked of it.

    Of each the steps it has made itself, of those it is to make; its loss, a mean of the last steps
    (up to three); and whether it trains, is done, or was stopped or cancelled, when and why.
    """
    config = read_run_config(run)
    steps = read_metrics(run) if log_files(run) else []
    rows = [
        {
            "task": task.name,
            "steps": summary.steps,
            "num_steps": task.num_steps,
            "loss": summary.loss_after if math.isfinite(summary.loss_after) else None,
            "state": summary.ended,
        }
        for task in config.tasks
        for summary in [task_summary(task.name, steps, task.num_steps, task.left_at is not None)]
    ]
    asked = [
        {"task": request.name, "asked": "to join" if request.task else "to leave"}
        for request in waiting(run).values()
    ]
    if json_output:
        print(json.dumps({"tasks": rows, "asked": asked}))
        return 0
    is_going_on = is_held(run / LOCK_FILE)
    table = Table(title=f"Tasks of {run}", title_justify="left")
    for column in ("task", "own steps made", "loss", "state"):
        table.add_column(column)
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4g}"
        ended = str(row["state"])
        is_open = ended.startswith("step ")  # so far
        state = ("trains" if is_going_on else "waits for the run to go on") if is_open else ended
        table.add_row(str(row["task"]), f"{row['steps']} of {row['num_steps']}", loss, state)
    console = Console()
    console.print(table)
    made = f"after {counted(steps[-1]['step'] + 1, 'step')}" if steps else "before its first step"
    console.print(f"the run is {made}, and {'' if is_going_on else 'not '}going on")
    for one in asked:
        console.print(f"{one['task']} is asked {one['asked']}: no answer yet", soft_wrap=True)
    return 0


def _ask(run: Path, requests: Sequence[TaskRequest], timeout: float, done: str) -> int:
    """Send requests and print the answers.

    Raises
    ------
    ConfigError
        With why each request was refused that was.
    MachineError
        If there is no answer in time.
    """
    if timeout <= 0:
        raise ConfigError(f"--timeout {timeout}: want a positive number")
    if not is_held(run / LOCK_FILE):
        raise ConfigError(f"{run}: the run is not going on; tasks join and leave while it trains")
    until = time.monotonic() + timeout
    sent = {send(run, request): request.name for request in requests}
    refused, unheard, open_ids = Problems(), [], set(sent)
    try:
        for request_id, name in sent.items():
            given = answer_to(run, request_id, until)
            open_ids.discard(request_id)
            if given is None:
                unheard.append(name)
            elif given.accepted:
                note = f" ({given.text})" if given.text else ""
                print(f"task {name} {done} after step {given.step}{note}", flush=True)
            else:
                refused.add(f"task {name}: {given.text}")
    finally:  # interrupted: what has no answer is not asked any more
        for request_id in open_ids:
            withdraw(run, request_id)
    refused.raise_if_any()
    if unheard:
        raise MachineError(
            f"{run}: no answer for {', '.join(unheard)} within {timeout:g} s: is the run going on? "
            f"What was asked is withdrawn"
        )
    return 0
