"""Many adapters on one base: ours, PEFT's switching, and the frozen base alone, side by side.

    python benchmarks/multi_lora.py --device cpu [--tasks 1,4,16,64] [--output FILE.json]
    python benchmarks/multi_lora.py --device cuda

All sides train the same steps on the same base with random weights, in turn, in one process; of
numbers of tasks, too, every one trains the same sequences. Sides:

    base           the frozen base alone, packed, no adapter and no update: the limit
    ours           the trainer's step on one rank
    peft-switching one task after the other, 4 rows a micro-batch as a Trainer does
    peft-sorted    the same with rows of like length, up to the most tokens, attention without mask
    peft-1-row, peft-8-rows

Experiments: `adapters` varies the number of tasks, `ranks` their rank, `batching` how micro-batches
are made. Printed are medians over the steps. TFLOP/s count the frozen model's operations alone; "of
limit" is the speed of whole steps over the base's, "fwd+bwd" without updates (PEFT's include them);
launches, of kernels on a GPU and operators on a CPU, are those of one micro-batch's sequences,
updates left out, and `--operators` writes them. Ctrl-C ends it and keeps what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.sides.base import PackedBase  # noqa: E402
from benchmarks.sides.bench import Bench  # noqa: E402
from benchmarks.sides.job import JOBS, save_model  # noqa: E402
from benchmarks.sides.lengths import find_lengths  # noqa: E402
from benchmarks.sides.operators import write_operators  # noqa: E402
from benchmarks.sides.side import Setting, Side, weights_dtype  # noqa: E402
from benchmarks.sides.switching import sorted_switching, switching  # noqa: E402
from benchmarks.sides.table import summaries, table  # noqa: E402
from lobra.common.errors import ConfigError  # noqa: E402
from lobra.common.files import write_atomic  # noqa: E402
from lobra.model.launch import default_threads  # noqa: E402
from lobra.profiler.hardware import describe_device, resolve_device, versions  # noqa: E402


def _ours(setting: Setting) -> Side:
    from benchmarks.sides.ours import Ours  # brings in deepspeed, which must know its device first

    return Ours(setting)


SIDES: Mapping[str, Callable[[Setting], Side]] = {
    "base": PackedBase,
    "ours": _ours,
    "peft-switching": switching(4),
    "peft-sorted": sorted_switching,
    "peft-1-row": switching(1),
    "peft-8-rows": switching(8),
}
USUAL = ("base", "ours", "peft-switching", "peft-sorted")


@dataclass(frozen=True)
class Experiment:
    """What an experiment varies, where the command line does not say it."""

    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    sides: tuple[str, ...]


EXPERIMENTS = {
    "adapters": Experiment((1, 4, 16, 64), (16,), USUAL),
    "ranks": Experiment((4,), (8, 16, 32, 64, 128), USUAL),
    "batching": Experiment((4,), (16,), tuple(SIDES)),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, the experiment's where none are given.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--job", choices=tuple(JOBS), help="default: the device's")
    parser.add_argument("--experiment", choices=tuple(EXPERIMENTS), default="adapters")
    parser.add_argument("--tasks", help="numbers of tasks, such as 1,4,16,64")
    parser.add_argument("--rank", help="ranks of the adapters, such as 16")
    parser.add_argument("--sides", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default 3)")
    parser.add_argument("--max-tokens", type=int, help="most tokens of a micro-batch")
    parser.add_argument("--cap", type=int, help="tokens at which sequences are cut")
    parser.add_argument("--sequences", type=int, help="sequences of a step")
    parser.add_argument("--lengths", type=Path, help="JSON of lengths by data set")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--operators", type=Path, metavar="FILE", help="CSV of launches to write")
    args = parser.parse_args(argv)
    args.device = resolve_device(args.device)
    job = JOBS[args.job or args.device]
    sizes = {
        "max_tokens": args.max_tokens,
        "cap": args.cap,
        "num_sequences": args.sequences,
    }
    args.job = replace(job, **{name: value for name, value in sizes.items() if value is not None})
    usual = EXPERIMENTS[args.experiment]
    problems: list[str] = []
    args.experiment = Experiment(
        _numbers("--tasks", args.tasks, problems) or usual.tasks,
        _numbers("--rank", args.rank, problems) or usual.ranks,
        tuple(args.sides.split(",")) if args.sides else usual.sides,
    )
    problems += [
        f"--sides: {name!r} is not one of {', '.join(SIDES)}"
        for name in args.experiment.sides
        if name not in SIDES
    ]
    if args.steps < 1:
        problems.append(f"--steps: {args.steps}; at least one")
    if args.job.cap < 2 or args.job.max_tokens < args.job.cap:
        problems.append(
            f"--cap {args.job.cap}, --max-tokens {args.job.max_tokens}: sequences of at least 2 "
            f"tokens, micro-batches that hold the longest"
        )
    share = len(args.job.datasets)
    if (
        args.job.num_sequences < max(share, *args.experiment.tasks)
        or args.job.num_sequences % share
    ):
        problems.append(
            f"--sequences: {args.job.num_sequences}; a multiple of {share}, the data sets, and at "
            f"least one a task"
        )
    if problems:
        raise ConfigError(problems)
    return args


def _numbers(option: str, text: str | None, problems: list[str]) -> tuple[int, ...]:
    words = text.split(",") if text else []
    wrong = [word for word in words if not word.isdecimal() or int(word) == 0]
    problems += [f"{option}: {word!r} is not a positive number" for word in wrong]
    return () if wrong else tuple(map(int, words))


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write the files; return 130 after Ctrl-C."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it
    if args.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(default_threads(1))
    else:
        torch.cuda.set_device(0)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape, slowly
    lengths = find_lengths(args.job.datasets, args.lengths)
    builders = {name: SIDES[name] for name in args.experiment.sides}
    bench = Bench(builders, args.job, lengths, args.device, args.steps)
    with tempfile.TemporaryDirectory() as name:
        backend = "nccl" if args.device == "cuda" else "gloo"
        store = dist.FileStore(f"{name}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        folder = Path(name) / "model"
        save_model(args.job.model, folder, weights_dtype(args.device), args.device)
        try:
            bench.run(folder, args.experiment.tasks, args.experiment.ranks)
        except KeyboardInterrupt:
            print("multi_lora: interrupted; what there is:", file=sys.stderr)
            return 130
        finally:
            report(bench, args)
            dist.destroy_process_group()
    return 0


def report(bench: Bench, args: argparse.Namespace) -> None:
    """Print the table and write the files that were asked for."""
    rows = summaries(bench.results)
    about = {
        "device": describe_device(args.device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "job": vars(args.job) | {"model": vars(args.job.model)},
        "lengths": bench.lengths.source,
    }
    hardware = f"{about['device']['name']}, {about['threads']} threads, torch {torch.__version__}"
    print(f"{hardware}; lengths: {bench.lengths.source}")
    print(table(rows))
    if args.output:
        content = {**about, "rows": rows, "results": [r.as_json() for r in bench.results]}
        write_atomic(args.output, json.dumps(content, indent=1) + "\n")
    if args.operators:
        write_operators(args.operators, bench.launches)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (2 for a mistake of the user's)."""
    try:
        return run(parse(argv))
    except ConfigError as error:
        print(f"multi_lora: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
