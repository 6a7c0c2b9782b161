"""The ledger of a run: which sequences each step trained, and whether any was left out or repeated.

A task's epochs, laid end to end, are cut into batches without a gap (`tasks.sampling`). A step's
line in metrics.jsonl has the place of every task's batch, and a digest of the sequences that its
order had. The places of consecutive batches must join, and each digest must be that of the
sequences of its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.documents import read_document
from lobra.layout.order import StepOrder
from lobra.layout.sequences import IntArray
from lobra.tasks.objectives import COMPARING, SEQUENCES_OF_EXAMPLE
from lobra.tasks.sampling import sample_indices, seed_of
from lobra.trainer.metrics import DrawnBatch, read_metrics
from lobra.trainer.run_spec import CONFIG_FILE
from lobra.trainer.task_progress import RunTask


def drawn_batches(
    order: StepOrder, own_steps: Mapping[int, int], tasks: Mapping[int, RunTask]
) -> dict[str, DrawnBatch]:
    """Return, by name, what an order trains of every task, each at its own step."""
    places: dict[int, list[int]] = {number: [] for number in own_steps}
    for sequence in order.sequences:
        places[sequence.task].append(sequence.index)
    found = {}
    for number, own_step in own_steps.items():
        task = tasks[number]
        examples, size = task.data.num_examples, task.config.global_batch_size
        epoch, position = divmod(own_step * size, examples)
        found[task.config.name] = DrawnBatch(
            own_step, epoch, position, size, examples, _digest(np.array(places[number]))
        )
    return found


def _digest(places: IntArray) -> str:
    """Return 16 hexadecimal digits that tell a collection of sequences, in whatever order."""
    ordered = np.sort(places).astype("<i8")
    return hashlib.sha256(ordered.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class LedgerCheck:
    """What a run's ledger says.

    Attributes
    ----------
    batches, examples
        How many batches it has, and how many examples these are.
    problems
        What was left out, repeated, or is another than its place says.
    """

    batches: int
    examples: int
    problems: tuple[str, ...]


def check_ledger(folder: Path) -> LedgerCheck:
    """Check the ledger of a run.

    Raises
    ------
    ConfigError
        The run's files cannot be read.
    """
    config = read_document(folder / CONFIG_FILE)
    seeds = {
        task["name"]: seed_of(task["name"], task.get("seed", 0), config["seed"])
        for task in config["tasks"]
    }
    sizes = {
        task["name"]: SEQUENCES_OF_EXAMPLE if task.get("objective") in COMPARING else 1
        for task in config["tasks"]
    }
    batches: dict[str, list[dict[str, Any]]] = {}
    for line in read_metrics(folder):
        for name, batch in line.get("drawn", {}).items():
            batches.setdefault(name, []).append(batch)
    problems = [
        f"task {name}: {problem}"
        for name, own in batches.items()
        for problem in _problems(own, seeds.get(name), sizes.get(name, 1))
    ]
    every = [batch for own in batches.values() for batch in own]
    return LedgerCheck(len(every), sum(batch["size"] for batch in every), tuple(problems))


def _problems(batches: Sequence[dict[str, Any]], seed: int | None, size: int) -> Iterator[str]:
    """Yield what is wrong with a task's batches; without its seed, places alone are looked at."""
    reached = 0
    for batch in batches:
        start = batch["epoch"] * batch["examples"] + batch["position"]
        own_step = batch["own_step"] + 1
        if start > reached:
            yield f"{start - reached} examples before its step {own_step} were never trained"
        elif start < reached:
            yield f"{reached - start} examples were trained again in its step {own_step}"
        reached = start + batch["size"]
        if seed is None:
            continue
        drawn = sample_indices(batch["examples"], batch["size"], seed, batch["own_step"])
        places = (drawn[:, None] * size + np.arange(size)).flatten()
        if _digest(places) != batch["digest"]:
            yield f"its step {own_step} trained other sequences than were drawn for it"
