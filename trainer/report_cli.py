"""`lobra report`: the report of a finished or running run."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.report import print_run_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lobra report`."""
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/quickstart")


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0."""
    print_run_report(args.run)
    return 0
