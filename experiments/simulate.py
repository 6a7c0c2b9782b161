"""One model's published experiments by simulation: tables as CSV, resumable, no GPU needed.

``lobra experiment simulate 7B --output exp_result/expr_7b`` is what ``expr_7b.sh --simulate``
calls. Cells that are finished are not computed again unless what they depend on changed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments import study
from experiments.bench import Bench
from experiments.cells import ROOT, CellStore, Workers, code_digest, start_workers
from experiments.inputs import (
    Costs,
    Lengths,
    Sources,
    find_costs,
    find_lengths,
    moments_table,
    setup_of,
    workload_of,
)
from experiments.methods import FUSED, LOBRA, OURS, Methods
from experiments.provenance import (
    PROVENANCE,
    TABLES,
    git_state,
    now,
    read_provenance,
    read_rows,
    same_sources,
    words_of,
)
from experiments.published import (
    HOMOGENEOUS_STEPS,
    PLANNING_TIME_S,
    PLANS_70B,
    THROUGHPUT,
)
from experiments.published import SCALE_GPUS as PUBLISHED_GPUS
from experiments.published import SCALE_TASKS as PUBLISHED_TASKS
from lobra.cli import resumable
from lobra.common.files import write_atomic
from lobra.common.models import at_least
from lobra.common.options import (
    Int,
    NonNegativeInt,
    PositiveInt,
    PositiveNumber,
    Within,
    as_options,
    option_problems,
)
from lobra.common.version import installed_version
from lobra.profiler.hardware import num_cores
from lobra.tasks.task_file import TrainerConfig, load_trainer_config

INFERRED_PLANS = {16: "<16,1>x1"}  # not published: the only layout that fits
SCALE_PLANS = {**INFERRED_PLANS, **PLANS_70B}
BUCKETS = (4, 6, 8, 12, 16, 20, 24, 28, 32)
SCALE_GPUS = (16, 32, 64, 128, 256)
# The scalability over tasks is run on copies of the four tasks of the scalability over GPUs.
SCALE_TASKS = {4: "exp_task4", 8: "exp_task4x2", 12: "exp_task4x3", 16: "exp_task4x4"}
Rows = list[dict[str, Any]]
WORKERS = min(2, num_cores())
AtLeastTwo = Annotated[Int, Within(at_least(2))]  # steps: an interval needs two


@as_options
@dataclass(frozen=True)
class SimulationOptions:
    """What is simulated, and from what.

    Parameters
    ----------
    model
        Which experiment.
    output
        Folder of the tables.
    steps
        Sampled steps per method.
    seed
        Of the sampled steps.
    workers
        Processes; by default at most 2.
    time_limit
        Seconds for each of LobRA's planners.
    estimate
        An estimated profile, even of 7B, of which there is a published one.
    lengths
        JSON or folder of .npy with lengths; by default LOBRA_LENGTHS.
    data_dir
        The data sets, if fetched.
    synthetic
        Synthetic lengths even if others are there.
    """

    model: Literal["7B", "32B", "70B"]
    _: KW_ONLY
    output: Path
    steps: AtLeastTwo = 100
    seed: NonNegativeInt = 0
    workers: PositiveInt = WORKERS
    time_limit: PositiveNumber = 20.0
    estimate: bool = False
    lengths: Path | None = None
    data_dir: Path = Path("data")
    synthetic: bool = False


class Experiment:
    """One model's experiment: its inputs, its cells and the CSVs it has written."""

    def __init__(self, options: SimulationOptions, sources: Sources, workers: Workers) -> None:
        self.options = options
        self.sources = sources
        self.workers = workers
        self.stores: list[CellStore] = []
        self.folder = options.output
        self.started, self.load = now(), round(os.getloadavg()[0], 2)
        self.setup, self.config = setup_of(options.model)
        self.costs = self._costs(self.config)
        self.lengths = self._lengths(self.config)
        self.planning: Rows = []
        self.inputs: dict[str, Any] = {}
        self.written: list[Path] = []
        self.store = self._store("main", self.costs, self.lengths, self.config)

    def _costs(self, config: TrainerConfig) -> Costs:
        return find_costs(
            self.options.model,
            str(config.path),
            len(config.tasks),
            self.sources,
            self.folder / "profile",
        )

    def _lengths(self, config: TrainerConfig) -> Lengths:
        return find_lengths(self.options.model, config, self.sources, self.options.seed)

    def _store(self, name: str, costs: Costs, lengths: Lengths, config: TrainerConfig) -> CellStore:
        context = {
            "model": self.options.model,
            "code": code_digest(),
            "profiles": costs.digest,
            "lengths": lengths.digest,
            "tasks": [[t.name, t.global_batch_size, t.context_length] for t in config.tasks],
            "steps": self.options.steps,
            "seed": self.options.seed,
        }
        self.inputs[name] = {
            "profile": costs.source,
            "profile_digest": costs.digest,
            "lengths": lengths.source,
            "lengths_digest": lengths.digest,
            "tasks": len(config.tasks),
            "code": context["code"],
        }
        store = CellStore(self.folder / "cells" / name, context, tell, self.workers)
        self.stores.append(store)
        return store

    def bench(self, num_gpus: int, config: TrainerConfig, costs: Costs, lengths: Lengths) -> Bench:
        """Return the bench of a cluster and a configuration."""
        workload = workload_of(config, lengths, self.options.seed)
        return Bench(self.options.model, num_gpus, workload, costs, self.options.steps)

    def write(self, name: str, rows: Rows) -> None:
        """Write a table as CSV."""
        path = self.folder / f"{name}.csv"
        write_atomic(path, to_csv(rows))
        self.written.append(path)

    def main_tables(self) -> None:
        """Compute methods, ablation, buckets and the timeline of the published set-up."""
        setup = self.setup
        bench = self.bench(setup.num_gpus, self.config, self.costs, self.lengths)
        self.write("lengths", moments_table(self.lengths))
        methods = Methods(bench, self.store, setup)
        self.write("methods", methods.rows())
        self.write("steps", methods.step_rows())
        self.write("sequential", methods.sequential_rows())
        self.write("ablation", methods.ablation_rows())
        self.write("buckets", methods.bucket_rows(BUCKETS))
        self.write("timeline", study.timeline_rows(bench, methods.plans))
        self.planning = study.planning_rows(
            bench, self.store, self.options.time_limit, published_plan=setup.lobra
        )
        self.write("planning_time", self.planning)

    def validation(self) -> None:
        """Compare the cost model with the published steps and throughput (7B only)."""
        rows: Rows = []
        for (plan, length, chunks), (lobra_s, nemo_s) in HOMOGENEOUS_STEPS.items():
            own_s = study.homogeneous_step_s(self.costs, plan, length, chunks)
            rows.append(
                {
                    "plan": plan,
                    "seq_len": length,
                    "chunks": chunks,
                    "measured_lobra_s": lobra_s,
                    "measured_nemo_s": nemo_s,
                    "predicted_s": round(own_s, 4),
                    "difference": round(own_s / lobra_s - 1.0, 5),
                }
            )
        self.write("homogeneous_steps", rows)
        rows = []
        for layout, published in THROUGHPUT.items():
            for length, value in published.items():
                own = study.throughput(self.costs, layout, length)
                steady = study.no_bubble_throughput(self.costs, layout, length)
                rows.append(
                    {
                        "layout": layout,
                        "seq_len": length,
                        "published_ktokens_s_gpu": value,
                        "predicted_ktokens_s_gpu": round(own, 3),
                        "difference": round(own / value - 1.0, 5),
                        "no_bubble_ktokens_s_gpu": round(steady, 3),
                        "no_bubble_difference": round(steady / value - 1.0, 5),
                    }
                )
        self.write("throughput", rows)

    def scalability(self) -> None:
        """Compute the scalability over GPUs and tasks, and the planning times (70B only)."""
        four, *more = (self._scale_inputs(number, name) for number, name in SCALE_TASKS.items())
        config, costs, lengths, store = four
        clusters = {}
        for num_gpus in SCALE_GPUS:
            bench = self.bench(num_gpus, config, costs, lengths)
            clusters[num_gpus] = bench, store, SCALE_PLANS.get(num_gpus)
        rows = study.scale_rows(clusters, "gpus", tuple(INFERRED_PLANS))
        self.write("scale_gpus", _relative(rows, "gpus", PUBLISHED_GPUS))
        tasks: dict[int, tuple[Bench, CellStore, str | None]] = {
            number: (self.bench(64, config, costs, lengths), store, None)
            for number, (config, costs, lengths, store) in zip(
                SCALE_TASKS, [four, *more], strict=True
            )
        }
        tasks[4] = clusters[64]
        rows = study.scale_rows(tasks, "tasks")
        self.write("scale_tasks", _relative(rows, "tasks", PUBLISHED_TASKS))
        for num_gpus, published in PLANNING_TIME_S.items():
            self.planning += study.planning_rows(
                self.bench(num_gpus, config, costs, lengths),
                store,
                self.options.time_limit,
                published_s=published,
                published_plan=PLANS_70B[num_gpus],
            )
            self.write("planning_time", self.planning)

    def _scale_inputs(
        self, number: int, name: str
    ) -> tuple[TrainerConfig, Costs, Lengths, CellStore]:
        config = load_trainer_config(name)
        costs = self._costs(config)
        lengths = self._lengths(config)
        return config, costs, lengths, self._store(f"{number}tasks", costs, lengths, config)

    def begin(self) -> None:
        """Say in provenance.json that the tables are being made.

        Tables and run times made from anything else (another profile, seed, code, ...) are
        removed, so that what lies in the folder was all made from what provenance.json says.
        """
        data = {**self._about(), "complete": False}
        old = read_provenance(self.folder)
        if not same_sources(old, data):
            for name in TABLES:
                (self.folder / f"{name}.csv").unlink(missing_ok=True)
        write_atomic(self.folder / PROVENANCE, json.dumps(data, indent=2) + "\n")

    def finish(self, seconds: float) -> None:
        """Write what the tables were made from, and when, and what this run took."""
        cells = sorted(path for store in self.stores for path in store.used)
        contents = [json.loads(cell.read_text(encoding="utf-8")) for cell in cells]
        spent = sum(content["seconds"] for content in contents)
        processor = sum(content["record"]["cell_processor_s"] for content in contents)
        data = {
            **self._about(),
            "complete": True,
            "written": now(),
            "cells": len(cells),
            "seconds_of_all_cells": round(spent, 1),
            "processor_seconds_of_all_cells": round(processor, 1),
        }
        write_atomic(self.folder / PROVENANCE, json.dumps(data, indent=2) + "\n")
        entry = {
            "started": self.started,
            "seconds": round(seconds, 1),
            "cells": len(cells),
            "computed": sum(store.computed for store in self.stores),
            "cell_seconds": round(spent, 1),
            "cell_processor_seconds": round(processor, 1),
            "workers": self.workers.number,
            "cores": num_cores(),
            "load_at_start": self.load,
            "load_at_end": round(os.getloadavg()[0], 2),
        }
        self.write("runs", [*read_rows(self.folder / "runs.csv"), entry])

    def _about(self) -> dict[str, Any]:
        options = self.options
        return {
            "kind": "simulation",
            "model": options.model,
            "num_gpus": self.setup.num_gpus,
            "accelerator": self.setup.accelerator,
            "steps": options.steps,
            "seed": options.seed,
            "time_limit_s": options.time_limit,
            "inputs": self.inputs,
            "command": shlex.join(["lobra", "experiment", "simulate", *words_of(options)]),
            "environment": {
                name: "set" if os.environ.get(name) else "not set" for name in ("LOBRA_LENGTHS",)
            },
            "started": self.started,
            **git_state(ROOT),
            "version": installed_version(),
        }


def simulate(options: SimulationOptions) -> int:
    """Compute the tables of one model's experiments by simulation, without GPUs.

    The same command goes on where it was interrupted.

      lobra experiment simulate 7B --output exp_result/expr_7b

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    option_problems(options).raise_if_any()
    with resumable():
        return _simulate(options, sources_of(options, os.environ))


def _simulate(options: SimulationOptions, sources: Sources) -> int:
    start = time.perf_counter()
    with start_workers(options.workers) as workers:
        experiment = Experiment(options, sources, workers)
        tell(f"{options.model}: {experiment.costs.source}; {experiment.lengths.source}")
        experiment.begin()
        experiment.main_tables()
        if options.model == "7B":
            experiment.validation()
        if options.model == "70B":
            experiment.scalability()
    experiment.finish(time.perf_counter() - start)
    tell(f"written: {options.output}; pictures and page: lobra report {options.output}")
    return 0


def to_csv(rows: Rows) -> str:
    """Return rows as CSV text; the columns are those of any row, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def tell(line: str) -> None:
    """Show one line of progress."""
    print(line, file=sys.stderr, flush=True)


def sources_of(options: SimulationOptions, environment: Mapping[str, str]) -> Sources:
    """Return where inputs are looked for: arguments, then environment."""
    if options.synthetic:
        return Sources(options.estimate, None, Path(os.devnull))
    named = environment.get("LOBRA_LENGTHS")
    lengths = options.lengths or (Path(named) if named else None)
    return Sources(options.estimate, lengths, options.data_dir)


def _relative(rows: Rows, column: str, published: Mapping[str, Mapping[int, float]]) -> Rows:
    """Return the rows with GPU-seconds relative to first points, and the published value.

    ``relative``: to Task-Fused's first point; ``relative_own``: to the method's own.
    """
    own: dict[str, float] = {}
    for row in rows:
        own.setdefault(row["method"], row["gpu_seconds"])
    first = own[FUSED]
    names = {FUSED: "Task-Fused", LOBRA: "LobRA", OURS: "LobRA"}
    return [
        {
            **row,
            "relative": round(row["gpu_seconds"] / first, 5),
            "relative_own": round(row["gpu_seconds"] / own[row["method"]], 5),
            "published": published[names[row["method"]]].get(row[column], "")
            if row["method"] in names
            else "",
        }
        for row in rows
    ]
