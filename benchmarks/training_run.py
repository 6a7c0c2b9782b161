"""A training run end to end: tokens/s, predicted against measured steps, time and memory profile.

    python benchmarks/training_run.py FOLDER [--device cuda] [--job cuda] [--steps 8]

Makes the job of benchmarks/multi_lora.py in FOLDER (a model with random weights, tokenised data),
profiles time and memory of one rank, trains on one replica ``<1,1>`` with `lobra`'s own commands,
and writes what was found to FOLDER/training_run.json. The first two steps are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.sides.job import JOBS, MODULES, Job, save_model  # noqa: E402
from benchmarks.sides.lengths import Lengths, find_lengths  # noqa: E402
from benchmarks.sides.side import weights_dtype  # noqa: E402
from lobra.common.files import write_atomic  # noqa: E402
from lobra.profiler.hardware import describe_device, resolve_device, versions  # noqa: E402

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


def main(argv: Sequence[str] | None = None) -> int:
    """Make the job, profile, train; what there is is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--job", choices=tuple(JOBS), help="default: the device's")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps: {args.steps}; more than the {WARM_UP_STEPS} that warm up")
    device, folder = resolve_device(args.device), args.folder.resolve()
    job = JOBS[args.job or device]
    found: dict[str, Any] = {"device": describe_device(device), "versions": versions()}

    def keep(**parts: Any) -> None:
        found.update(parts)
        write_atomic(folder / "training_run.json", json.dumps(found, indent=1) + "\n")

    lengths = find_lengths(job.datasets)
    save_model(job.model, folder / "model", weights_dtype(device), device)
    write_tokenizer(folder / "model", job.model.vocabulary)
    write_tasks(job, lengths, folder, args.steps)
    keep(lengths=lengths.source)
    plan = f"strategy_config:\n- {{dp: 1, tp: 1, pp: 1, max_tokens: {job.max_tokens}}}\n"
    write_atomic(folder / "plan.yaml", plan)
    common = ("--model", folder / "model", "--device", device)
    tasks = ("--trainer-config", folder / "tasks.json")
    profile = (*common, *tasks, "--max-seq-length", job.max_tokens, "--output")
    time_csv, memory_csv = folder / "time.csv", folder / "memory.csv"
    took_s = run_lobra("profile", "time", *profile, time_csv, "--tp", 1)
    keep(layer_time_ms=read_rows(time_csv), profile_time_s=took_s)
    took_s = run_lobra(
        *("train", *common, *tasks, "--strategy-config", folder / "plan.yaml"),
        *("--data-dir", folder / "data", "--output-dir", folder / "run"),
        *("--time-profile", time_csv, "--max-steps", args.steps),
    )
    keep(training=step_medians(folder / "run" / "metrics.jsonl"), training_s=took_s)
    took_s = run_lobra("profile", "memory", *profile, memory_csv, "--num-gpus", 1)
    keep(capacity=read_rows(memory_csv), profile_memory_s=took_s)
    print(json.dumps(found["training"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
