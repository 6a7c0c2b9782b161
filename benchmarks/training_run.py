"""A training run end to end: tokens/s, predicted against measured steps, time and memory profile.

Makes the job of `multi_lora` in a folder (a model with random weights, tokenised data), profiles
time and memory of one rank, and trains on one replica ``<1,1>``, with `lobra`'s own commands. The
first two steps are left out.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.sides.job import JOBS, MODULES, Job, JobName, save_model
from benchmarks.sides.lengths import ROOT, Lengths, find_lengths
from benchmarks.sides.side import weights_dtype
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.options import Device
from lobra.profiler.hardware import describe_device, resolve_device

WARM_UP_STEPS = 2
RANK = 16
MASKED = -100


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer that the trainer can load; the data are token ids already."""
    from tokenizers import Tokenizer, models

    words = {f"t{number}": number for number in range(vocabulary)}
    Tokenizer(models.WordLevel(words, unk_token="t1")).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t1", "eos_token": "t2"}
    write_atomic(folder / "tokenizer_config.json", json.dumps(config))


def write_tasks(job: Job, lengths: Lengths, folder: Path, num_steps: int) -> None:
    """Write a task of every data set, with the sequences of as many steps."""
    names = job.datasets
    rows: list[list[str]] = [[] for _ in names]
    for number in range(num_steps):
        for sequence in job.step(lengths, number, len(names)):
            labels = np.full_like(sequence.tokens, MASKED)
            labels[sequence.targets] = sequence.tokens[sequence.targets]
            row = {"input_ids": sequence.tokens.tolist(), "labels": labels.tolist()}
            rows[sequence.task].append(json.dumps(row) + "\n")
    for name, own in zip(names, rows, strict=True):
        write_atomic(folder / "data" / f"{name}.jsonl", "".join(own))
    tasks = [
        {
            "name": name,
            "dataset_name": name,
            "rank": RANK,
            "lora_alpha": RANK,
            "target_modules": list(MODULES),
            "global_batch_size": job.num_sequences // len(names),
            "context_length": job.cap,
            "learning_rate": job.learning_rate,
            "steps": num_steps,
        }
        for name in names
    ]
    write_atomic(folder / "tasks.json", json.dumps({"task": tasks}, indent=1))


def run_lobra(*arguments: object) -> float:
    """Run a `lobra` command and return the seconds it took; CalledProcessError if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), _path())))}
    command = [sys.executable, "-m", "lobra.cli", *map(str, arguments)]
    start_s = time.perf_counter()
    subprocess.run(command, env=environment, check=True)
    return time.perf_counter() - start_s


def _path() -> str:
    return os.environ.get("PYTHONPATH", "")


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a profile."""
    with path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def step_medians(metrics: Path) -> dict[str, float]:
    """Return medians over the steps after the first ones."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    errors = [step["predicted_step_time_s"] / step["step_time_s"] - 1 for step in steps]
    parts = ("step_time_s", "predicted_step_time_s", "prepare_time_s", "optimizer_time_s")
    return {
        "steps": len(steps),
        "tokens_per_s": median(step["tokens"] / step["step_time_s"] for step in steps),
        "padded_per_real": sum(s["padded_tokens"] for s in steps) / sum(s["tokens"] for s in steps),
        "median_error": median(map(abs, errors)),
        "memory_bytes": max(step["memory_bytes"] for step in steps),
        **{part: median(step[part] for step in steps) for part in parts},
    }


def training_run(
    folder: Path, *, device: Device = "auto", job: JobName | None = None, steps: int = 8
) -> Iterator[dict[str, Any]]:
    """Make a job, profile time, train, profile memory.

    Parameters
    ----------
    folder
        Where all of it lies afterwards.
    job
        Sizes of the model and of a step; by default the device's.
    steps
        To train, those that warm up included.

    Raises
    ------
    ConfigError
        If no step would be left.
    """
    if steps <= WARM_UP_STEPS:
        raise ConfigError(f"--steps: {steps}; more than the {WARM_UP_STEPS} that warm up")
    device, folder = resolve_device(device), folder.resolve()
    sizes = JOBS[job or device]
    lengths = find_lengths(sizes.datasets)
    save_model(sizes.model, folder / "model", weights_dtype(device), device)
    write_tokenizer(folder / "model", sizes.model.vocabulary)
    write_tasks(sizes, lengths, folder, steps)
    plan = f"strategy_config:\n- {{dp: 1, tp: 1, pp: 1, max_tokens: {sizes.max_tokens}}}\n"
    write_atomic(folder / "plan.yaml", plan)
    yield {**describe_device(device), "lengths": lengths.source}
    common = ("--model", folder / "model", "--device", device)
    tasks = ("--trainer-config", folder / "tasks.json")
    profile = (*common, *tasks, "--max-seq-length", sizes.max_tokens, "--output")
    time_csv, memory_csv = folder / "time.csv", folder / "memory.csv"
    took_s = run_lobra("profile", "time", *profile, time_csv, "--tp", 1, "--quick")
    yield {"command": "profile time", "took_s": took_s, "rows": read_rows(time_csv)}
    took_s = run_lobra(
        *("train", *common, *tasks, "--strategy-config", folder / "plan.yaml"),
        *("--data-dir", folder / "data", "--output-dir", folder / "run"),
        *("--time-profile", time_csv, "--max-steps", steps),
    )
    yield {
        "command": "train",
        "took_s": took_s,
        **step_medians(folder / "run" / "metrics.jsonl"),
    }
    took_s = run_lobra("profile", "memory", *profile, memory_csv, "--num-gpus", 1)
    yield {"command": "profile memory", "took_s": took_s, "rows": read_rows(memory_csv)}
