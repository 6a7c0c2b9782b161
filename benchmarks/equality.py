"""How far are our adapters, trained jointly, from PEFT's, trained alone?

    python benchmarks/equality.py [--precision fp64,fp32] [--families llama,gemma] [--device cuda]
        [--plans tested|all|"one <1,1>;<1,1> <2,2>"] [--output FILE.json]

Trains the tasks of tests/trainer/test_equality.py alone with PEFT (on the CPU) and jointly with us,
and prints, family by family and plan by plan, the largest relative (Frobenius) difference from PEFT
in fp64 over each task's tensors. In fp32 and bf16 a first row says how far PEFT's own run in that
precision is from fp64: what rounding alone does to an Adam update. Exits with 1 if a run in fp64 is
further away than the tests allow.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lobra.common.errors import ConfigError  # noqa: E402
from lobra.common.files import write_atomic  # noqa: E402
from lobra.model.precision import DTYPES  # noqa: E402
from lobra.profiler.hardware import resolve_device  # noqa: E402
from tests.model.support import FAMILIES, save_family  # noqa: E402
from tests.trainer.alone import TASKS, make_starts  # noqa: E402
from tests.trainer.test_equality import (  # noqa: E402
    BAR,
    EVERY_FAMILY,
    PLANS,
    Reference,
    final_tensors,
    relative_errors,
    train_jointly,
)

Tensors = dict[str, torch.Tensor]
PEFT = "PEFT alone"


@dataclass(frozen=True)
class Distance:
    """Each task's largest relative difference from PEFT in fp64, over its tensors."""

    precision: str
    family: str
    plan: str
    tasks: dict[str, float]

    @property
    def too_far(self) -> bool:
        """Whether it is a proof that has failed."""
        return self.precision == "fp64" and max(self.tasks.values()) >= BAR


def distances(
    families: Sequence[str], precisions: Sequence[str], plans: str, device: str
) -> Iterator[Distance]:
    """Train and yield what was found, run by run."""
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = save_family(family, folder / "base")
            reference = Reference(base, make_starts(base, folder / "starts"))
            exact = [run["tensors"] for run in reference.alone(torch.float64)]
            for precision in precisions:
                if precision != "fp64":
                    alone = [run["tensors"] for run in reference.alone(DTYPES[precision])]
                    yield Distance(precision, family, PEFT, largest_errors(alone, exact))
                for plan in plans_of(plans, family):
                    place = folder / f"{precision}-{plan}"
                    run, _ = train_jointly(reference, PLANS[plan], place, precision, device)
                    ours = [final_tensors(run, task) for task in range(len(TASKS))]
                    yield Distance(precision, family, plan, largest_errors(ours, exact))


def plans_of(plans: str, family: str) -> Sequence[str]:
    """Return the names of a family's plans."""
    if plans in ("tested", "all"):
        return tuple(PLANS) if plans == "all" or family == "llama" else EVERY_FAMILY
    return plans.split(";")


def largest_errors(ours: list[Tensors], exact: list[Tensors]) -> dict[str, float]:
    """Return each task's largest relative difference over its tensors."""
    return {
        str(task["name"]): max(relative_errors(mine, other).values())
        for task, mine, other in zip(TASKS, ours, exact, strict=True)
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp64", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--plans", default="tested", help=f"tested, all, or of {'; '.join(PLANS)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    args.device = resolve_device(args.device)
    args.precision, args.families = args.precision.split(","), args.families.split(",")
    named = [] if args.plans in ("tested", "all") else args.plans.split(";")
    problems = [
        f"{option}: {value!r} is not one of {', '.join(known)}"
        for option, values, known in (
            ("--precision", args.precision, DTYPES),
            ("--families", args.families, FAMILIES),
            ("--plans", named, PLANS),
        )
        for value in values
        if value not in known
    ]
    if problems:
        raise ConfigError(problems)
    return args


def run(args: argparse.Namespace) -> int:
    """Print the table, and write what there is after every run."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    names = " | ".join(str(task["name"]) for task in TASKS)
    print(f"| {args.device}, from PEFT in fp64 | {names} |\n|---|{'---|' * len(TASKS)}")
    found: list[Distance] = []
    for distance in distances(args.families, args.precision, args.plans, args.device):
        found.append(distance)
        values = " | ".join(f"{value:.1e}" for value in distance.tasks.values())
        plan = distance.plan.removeprefix("one ")
        print(f"| {distance.precision}, {distance.family}, {plan} | {values} |", flush=True)
        if args.output:
            content = {"device": args.device, "bar_fp64": BAR, "rows": [asdict(d) for d in found]}
            write_atomic(args.output, json.dumps(content, indent=1) + "\n")
    return int(any(distance.too_far for distance in found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (2 for a mistake of the user's)."""
    try:
        return run(parse(argv))
    except ConfigError as error:
        print(f"equality: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
