"""One model's published experiments for real: profile, plan, train every method, compare.

``lobra experiment real 7B --output exp_result/expr_7b_real`` is what ``expr_7b.sh`` calls
without ``--simulate``. It needs the GPUs, the model's weights and the data sets. What is finished
is skipped; ``--dry-run`` shows the commands and starts nothing.

Run for real: methods and ablation. Simulated only (``--simulate``): scalability over GPUs and
tasks, sensitivity to the number of buckets, planning times of every pattern, and baselines with
LobRA's even dealing; the real baselines have our dispatcher.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.bench import NUM_BUCKETS, Bench
from experiments.cells import ROOT, Record
from experiments.inputs import LARGEST_LAYOUT, MAX_SEQ_LENGTH, TPS, Costs, setup_of, workload_of
from experiments.inputs import Lengths as FoundLengths
from experiments.methods import (
    DYNAMIC_RUNG,
    FUSED,
    HOMOGENEOUS,
    LOBRA,
    MEASURED_FUSED,
    OURS,
    RUNGS,
    SEQUENTIAL,
    ablation_table,
    method_rows,
)
from experiments.provenance import PROVENANCE, git_state, words_of
from experiments.published import Setup, parse_plan
from experiments.runs import together
from experiments.simulate import tell, to_csv
from lobra.cli import resumable
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.options import (
    THIS_MACHINE,
    Int,
    LauncherOptions,
    NonNegativeInt,
    as_options,
    option_problems,
)
from lobra.layout.plan import save_plan
from lobra.planner.baselines import FUSED_BUCKETS
from lobra.planner.workload import read_lengths
from lobra.profiler.cost_model import load_cost_model
from lobra.profiler.profiles import default_memory_path, load_memory_profile
from lobra.tasks.task_file import TrainerConfig

STATIC = ("--batching", "bucketed", "--dp-bucket", "off", "--num-buckets")
DYNAMIC = ("--batching", "bucketed", "--dp-bucket", "on", "--num-buckets", str(NUM_BUCKETS))
PLANS = {"lobra": "LobRA", "ours": "ours"}  # a plan's file -> its owner in the tables
RUNS = dict(zip(RUNGS, ("group", "balance", "dynamic"), strict=True))  # rung -> run's name


@dataclass(frozen=True)
class Job:
    """A command, the environment it adds, and the file that says that it is finished.

    ``steps``: the finished file is a run's ``metrics.jsonl`` with at least so many lines.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    finished: Path | None = None
    steps: int = 0

    def is_finished(self) -> bool:
        """Return whether the job need not be run."""
        if self.finished is None or not self.finished.is_file():
            return False
        return not self.steps or len(read_steps(self.finished)) >= self.steps

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*words, *self.command])


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the steps of a ``metrics.jsonl``; a line a killed run cut off is left out."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if isinstance(entry, dict) and "step_time_s" in entry:
            steps.append(entry)
    return steps


@as_options
@dataclass(frozen=True)
class JobOptions:
    """What is run, and where.

    Parameters
    ----------
    model
        Which experiment.
    output
        Folder of plans, runs and tables.
    steps
        Training steps per method.
    warm_up
        First steps that are not counted.
    seed
        Of the training runs.
    data_dir
        The data sets.
    dry_run
        Show the commands, start nothing.
    """

    model: Literal["7B", "32B", "70B"]
    _: KW_ONLY
    output: Path
    steps: Int = 20
    warm_up: NonNegativeInt = 1
    seed: NonNegativeInt = 0
    data_dir: Path = Path("data")
    dry_run: bool = False
    launcher: LauncherOptions = THIS_MACHINE


def profile_jobs(setup: Setup, config: TrainerConfig, options: JobOptions) -> list[Job]:
    """Return the profilers' jobs; both resume by themselves."""
    hosts = ["", "", str(options.launcher.host_file)] if options.launcher.host_file else []
    time_words: list[str] = [
        "bash",
        "scripts/cost_model_benchmark.sh",
        options.model,
        TPS[setup.model],
    ]
    memory_words = ["bash", "scripts/profile_memory.sh", options.model, str(LARGEST_LAYOUT)]
    memory_words += [str(len(config.tasks)), str(config.path), str(MAX_SEQ_LENGTH)]
    return [
        Job("time profile", tuple(time_words + hosts)),
        Job("memory profile", tuple(memory_words + hosts)),
    ]


def plan_jobs(setup: Setup, config: TrainerConfig, options: JobOptions) -> list[Job]:
    """Return the planners' jobs: ours, and LobRA's pruning over proposed layouts."""
    jobs = []
    for name, pattern, proposal in (("ours", "EXACT", "OFF"), ("lobra", "PRUNE", "ON")):
        path = options.output / "plans" / f"{name}.yaml"
        command = ["bash", "scripts/deploy_strategy_plan.sh", options.model, str(setup.num_gpus)]
        command += [str(NUM_BUCKETS), str(len(config.tasks)), str(MAX_SEQ_LENGTH)]
        command += [str(config.path), str(path), "--data-dir", str(options.data_dir)]
        switches = {"EXPR_DEPLOY_PATTERN": pattern, "EXPR_SCHEME_PROPOSAL": proposal}
        jobs.append(Job(f"plan {name}", tuple(command), switches, path))
    return jobs


def train_jobs(setup: Setup, config: TrainerConfig, options: JobOptions) -> list[Job]:
    """Return the training jobs of all methods and of the ablation."""
    jobs: list[Job] = [
        _train("fused", "fused", str(config.path), (*STATIC, str(FUSED_BUCKETS)), setup, options)
    ]
    for task in config.tasks:
        own = str(options.output / "configs" / f"{task.name}.json")
        name = f"sequential/{task.name}"
        jobs.append(_train(name, name, own, (*STATIC, str(FUSED_BUCKETS)), setup, options))
    for plan in PLANS:
        for rung, (static, mode) in RUNGS.items():
            words: tuple[str, ...] = (*STATIC, str(static)) if static else DYNAMIC
            if mode != "balance":
                words = (*words, "--dispatch", mode)
            name = f"{plan}_{RUNS[rung]}"
            jobs.append(_train(name, plan, str(config.path), words, setup, options))
    return jobs


def _train(
    name: str,
    plan: str,
    config: str,
    words: tuple[str, ...],
    setup: Setup,
    options: JobOptions,
) -> Job:
    folder = options.output / "runs" / name
    command = ["lobra", "train", "--model", options.model, "--trainer-config", config]
    command += ["--strategy-config", str(options.output / "plans" / f"{plan}.yaml")]
    command += ["--output-dir", str(folder), "--max-steps", str(options.steps), *words]
    command += ["--num-gpus", str(setup.num_gpus), "--data-dir", str(options.data_dir)]
    command += ["--max-seq-length", str(MAX_SEQ_LENGTH), "--seed", str(options.seed)]
    command += words_of(options.launcher)
    return Job(f"train {name}", tuple(command), {}, folder / "metrics.jsonl", options.steps)


def write_homogeneous(setup: Setup, config: TrainerConfig, options: JobOptions) -> None:
    """Write the baselines' plans, best by the measured profiles, and a configuration per task."""
    memory = load_memory_profile(default_memory_path(options.model, len(config.tasks)))
    costs = Costs(load_cost_model(options.model), memory, "measured", memory.digest)
    found = FoundLengths(read_lengths(config, options.model, options.data_dir), "data sets")
    workload = workload_of(config, found, options.seed)
    bench = Bench(options.model, setup.num_gpus, workload, costs, options.steps)
    plans = options.output / "plans"
    save_plan(bench.best_homogeneous(workload), plans / "fused.yaml")
    raw = json.loads(Path(config.path).read_text(encoding="utf-8"))
    for task, entry in zip(config.tasks, raw["task"], strict=True):
        alone = {**raw, "train_task_num": 1, "task": [{"name": task.name, **entry}]}
        text = json.dumps(alone, indent=2) + "\n"
        write_atomic(options.output / "configs" / f"{task.name}.json", text)
        plan = bench.best_homogeneous(bench.task(task.name))
        save_plan(plan, plans / "sequential" / f"{task.name}.yaml")


def record_of(folder: Path, num_gpus: int, options: JobOptions) -> Record:
    """Return a run's measured steps, those of the warm-up left out, as the tables want them."""
    path = folder / "metrics.jsonl"
    steps = read_steps(path)[options.warm_up : options.steps]
    if not steps:
        raise ConfigError(f"{path}: no steps after the warm-up of {options.warm_up}")
    layouts = Counter(str(replica["layout"]) for replica in steps[0]["replicas"])
    times = [step["step_time_s"] for step in steps]
    tokens = [step["tokens"] for step in steps]
    padded = [step["padded_tokens"] for step in steps]
    busy = sum(
        replica["busy_s"] * _num_gpus(replica["layout"]) / num_gpus
        for step in steps
        for replica in step["replicas"]
    )
    return {
        "plan": " ".join(f"{layout}x{number}" for layout, number in layouts.items()),
        "num_gpus": num_gpus,
        "gpus_used": sum(_num_gpus(layout) * number for layout, number in layouts.items()),
        "step_time_s": times,
        "tokens": tokens,
        "padded_tokens": padded,
        "idle": 1.0 - busy / sum(times),
        "padding": 1.0 - sum(tokens) / sum(padded),
        "dispatch_ms": 1e3 * sum(s["dispatch_time_s"] for s in steps) / len(steps),
    }


def collect(setup: Setup, config: TrainerConfig, options: JobOptions) -> list[Path]:
    """Write methods.csv and ablation.csv from the runs' metrics, all measured; return the paths."""

    def record(name: str) -> Record:
        return record_of(options.output / "runs" / name, setup.num_gpus, options)

    alone = [record(f"sequential/{task.name}") for task in config.tasks]
    fused = record("fused")
    rungs = {(plan, rung): record(f"{plan}_{RUNS[rung]}") for plan in PLANS for rung in RUNGS}
    steps = min(len(r["step_time_s"]) for r in (*alone, fused, *rungs.values()))
    for one in (*alone, fused, *rungs.values()):
        for key in ("step_time_s", "tokens", "padded_tokens"):
            one[key] = one[key][:steps]
    records = {
        SEQUENTIAL: together(alone, setup.num_gpus),
        FUSED: fused,
        LOBRA: rungs["lobra", DYNAMIC_RUNG],
        OURS: rungs["ours", DYNAMIC_RUNG],
    }
    baselines = {"sequential": records[SEQUENTIAL], "fused": fused}
    ablation = {(HOMOGENEOUS, MEASURED_FUSED): fused}
    ablation |= {(PLANS[plan], rung): found for (plan, rung), found in rungs.items()}
    tables = {
        "methods": method_rows(records, baselines),
        "ablation": ablation_table(ablation, baselines),
    }
    paths = [options.output / f"{name}.csv" for name in tables]
    for path, rows in zip(paths, tables.values(), strict=True):
        write_atomic(path, to_csv(rows))
    about = {"kind": "measured", "model": options.model, "num_gpus": setup.num_gpus, "steps": steps}
    about |= {
        "warm_up": options.warm_up,
        "seed": options.seed,
        "command": shlex.join(["lobra", "experiment", "real", *words_of(options)]),
    }
    about |= {"accelerator": "see the runs' config.yaml", **git_state(ROOT), "complete": True}
    write_atomic(options.output / PROVENANCE, json.dumps(about, indent=2) + "\n")
    return paths


def _num_gpus(layout: str) -> int:
    ((tp, pp, _),) = parse_plan(layout)
    return tp * pp


def _put_aside(folder: Path) -> None:
    """Rename what an interrupted run left, so that the run starts afresh and nothing is lost."""
    if folder.exists():
        number = 1
        while (kept := folder.with_name(f"{folder.name}.interrupted{number}")).exists():
            number += 1
        folder.rename(kept)


def real(options: JobOptions) -> int:
    """Run one model's experiments on the GPUs of a cluster: profile, plan, train every method.

    What is finished is skipped. Ends with the exit code of the first job that fails.

      lobra experiment real 7B --output exp_result/expr_7b_real --dry-run

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    option_problems(options).raise_if_any()
    setup, config = setup_of(options.model)
    fewest = min(
        (task.steps for task in config.tasks if task.steps is not None), default=options.steps
    )
    if not options.warm_up + 2 <= options.steps <= fewest:
        raise ConfigError(
            f"--steps: {options.steps}; {config.path} allows {options.warm_up + 2} to {fewest}, "
            f"of which {options.warm_up} are not counted (--warm-up)"
        )
    before = [*profile_jobs(setup, config, options), *plan_jobs(setup, config, options)]
    training = train_jobs(setup, config, options)
    if options.dry_run:
        for job in [*before, *training]:
            print(job)
        return 0
    (options.output / "plans").mkdir(parents=True, exist_ok=True)
    with resumable():
        for number, job in enumerate([*before, *training]):
            if number == len(before):
                write_homogeneous(setup, config, options)
            if job.is_finished():
                tell(f"{job.name}: finished before")
                continue
            if job.steps and job.finished is not None:
                _put_aside(job.finished.parent)
            tell(f"{job.name}: {job}")
            ended = subprocess.run(job.command, env={**os.environ, **job.environment}, check=False)
            if ended.returncode:
                tell(f"{job.name}: exit code {ended.returncode}; the same command continues here")
                return ended.returncode
    paths = collect(setup, config, options)
    tell(f"written: {', '.join(map(str, paths))}; pictures: lobra report {options.output}")
    return 0
