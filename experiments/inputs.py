"""What an experiment runs on: profiles and lengths, and where each of them came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.cells import ROOT
from experiments.published import LENGTHS, SETUPS, Setup
from experiments.synthetic import moments
from lobra.common.errors import ConfigError
from lobra.planner.workload import Workload, make_workload, read_lengths
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.lookup import published_memory_path, published_time_path
from lobra.profiler.profiles import (
    MemoryProfile,
    load_memory_profile,
    load_time_profile,
    num_layers_of,
)
from lobra.tasks.lengths import load_lengths
from lobra.tasks.published_lengths import MIXTURES, published_lengths
from lobra.tasks.task_file import TrainerConfig, load_trainer_config

MAX_SEQ_LENGTH = 16384
LARGEST_LAYOUT = 16  # GPUs of one replica
TPS = {"7B": "1,2,4,8", "32B": "1,2,4,8,16", "70B": "1,2,4,8,16"}
RUNTIME = "hetu"  # the estimates are of the runtime LobRA was measured on


@dataclass(frozen=True)
class Sources:
    """Where to look, as the command line and the environment say.

    ``estimate``: no published profile; ``lengths``: file or folder of lengths; ``data_dir``: the
    data sets.
    """

    estimate: bool = False
    lengths: Path | None = None
    data_dir: Path = Path("data")


@dataclass(frozen=True, eq=False)
class Costs:
    """Profiles of a model: the cost model, the memory profile, and what they are."""

    cost_model: CostModel
    memory: MemoryProfile
    source: str
    digest: str


@dataclass(frozen=True, eq=False)
class Lengths:
    """Lengths by data set, and what they are."""

    values: Mapping[str, np.ndarray]
    source: str

    @property
    def digest(self) -> str:
        """A digest of all lengths."""
        digest = hashlib.sha256()
        for name in sorted(self.values):
            digest.update(name.encode())
            digest.update(np.asarray(self.values[name], dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


def find_costs(model: str, config: str, num_tasks: int, sources: Sources, folder: Path) -> Costs:
    """Return the published profile, which there is of 7B, else estimates written to ``folder``."""
    time_path = ROOT / published_time_path(model)
    memory_path = ROOT / published_memory_path(model, num_tasks)
    if time_path.is_file() and not sources.estimate:
        source = "published profile of Llama2-7B on A100-40GB"
    else:
        time_path, memory_path = _estimate(model, config, num_tasks, folder)
        source = f"ESTIMATE for {SETUPS[model].accelerator}, not measured"
    times = load_time_profile(time_path)
    memory = load_memory_profile(memory_path)
    cost_model = fit_cost_model(times, num_layers_of(model))
    return Costs(cost_model, memory, source, f"{times.digest}-{memory.digest}")


def find_lengths(model: str, config: TrainerConfig, sources: Sources, seed: int) -> Lengths:
    """Return lengths: those given, else of the data sets, else synthetic."""
    if sources.lengths is not None:
        return Lengths(load_lengths(sources.lengths), f"lengths of {sources.lengths.name}")
    names = list(dict.fromkeys(name for task in config.tasks for name in task.dataset_names))
    if all((sources.data_dir / f"{name}.jsonl").is_file() for name in names):
        try:
            return Lengths(read_lengths(config, model, sources.data_dir), "the data sets")
        except ConfigError as error:
            raise ConfigError(
                [
                    f"{sources.data_dir} has the data sets, but they cannot be tokenised for "
                    f"{model}; give --lengths, or another --data-dir to do without them",
                    *error.problems,
                ]
            ) from error
    unknown = [name for name in names if name not in MIXTURES]
    if unknown:
        raise ConfigError(f"no lengths and no published moments of: {', '.join(unknown)}")
    values = {name: published_lengths(name, seed) for name in names}
    return Lengths(values, "synthetic lengths fitted to the published moments")


def moments_table(lengths: Lengths) -> list[dict[str, object]]:
    """Return, per data set with published moments, wanted and reached moments."""
    rows: list[dict[str, object]] = []
    for name, values in lengths.values.items():
        wanted = LENGTHS.get(name)
        if wanted is None:
            continue
        found = moments(values)
        rows.append(
            {
                "dataset": name,
                "source": lengths.source,
                "sequences": len(values),
                "mean_published": wanted.mean,
                "mean": round(found.mean, 1),
                "mean_error": round(found.mean / wanted.mean - 1.0, 5),
                "skewness_published": wanted.skewness,
                "skewness": round(found.skewness, 3),
                "skewness_error": round(found.skewness / wanted.skewness - 1.0, 4),
                "kurtosis_published": wanted.kurtosis,
                "kurtosis": round(found.kurtosis, 3),
                "kurtosis_error": round(found.kurtosis / wanted.kurtosis - 1.0, 4),
                "longest": int(np.max(values)),
            }
        )
    return rows


def workload_of(config: TrainerConfig, lengths: Lengths, seed: int) -> Workload:
    """Return the workload of a configuration over the lengths in a run of ``seed``.

    Its tasks never end, so that every step of a table has all of them, as the published ones have.
    """
    return replace(make_workload(config, lengths.values, MAX_SEQ_LENGTH, seed), num_steps={})


def setup_of(model: str) -> tuple[Setup, TrainerConfig]:
    """Return a model's published set-up and its trainer configuration."""
    setup = SETUPS[model]
    return setup, load_trainer_config(setup.trainer_config)


def _estimate(model: str, config: str, num_tasks: int, folder: Path) -> tuple[Path, Path]:
    """Write (or complete) the estimated profiles through `lobra profile`; return their paths."""
    from lobra.cli import main

    setup = SETUPS[model]
    times = folder / f"profile_time_{model}.csv"
    memory = folder / f"max_tokens_{model}_{num_tasks}tasks.csv"
    common = ["--model", model, "--estimate", "--accelerator", setup.accelerator]
    common += ["--runtime", RUNTIME, "--restart", "changed"]
    head = folder / f"profile_head_{model}.csv"
    wanted = ["--tp", TPS[model], "--output", str(times), "--head-output", str(head)]
    _profile(main, ["profile", "time", *common, *wanted])
    wanted = ["--num-gpus", str(LARGEST_LAYOUT), "--trainer-config", config]
    wanted += ["--max-seq-length", str(MAX_SEQ_LENGTH), "--output", str(memory)]
    _profile(main, ["profile", "memory", *common, *wanted])
    return times, memory


def _profile(main: object, argv: list[str]) -> None:
    assert callable(main)
    if main(argv) != 0:
        raise ConfigError(f"lobra {' '.join(argv)}: failed, see above")
