"""`lobra report`: the report of a run, of a simulation or of an experiment."""

from __future__ import annotations

import argparse
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.report.experiment_report import ABOUT, SIMULATION, experiments_in, report_experiment
from lobra.report.run_plots import plot_run
from lobra.report.run_report import print_run_report, run_parts
from lobra.report.trace import write_trace

CONFIG = "config.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lobra report`."""
    parser.add_argument("run", type=Path, help="folder of a run, a simulation or an experiment")
    parser.add_argument("--plots", action="store_true", help="write pictures under RUN/report")
    parser.add_argument("--trace", action="store_true", help="write RUN/trace.json (Chrome trace)")


def run(args: argparse.Namespace) -> int:
    """Print the report, write what else was asked for, and return 0.

    Experiments and simulations get their pictures and their page in any case.
    """
    if experiments := experiments_in(args.run):
        for folder in experiments:
            for path in report_experiment(folder):
                print(f"written: {path}")
        return 0
    if not args.run.is_dir():
        raise ConfigError(f"{args.run}: no such folder")
    if not (args.run / CONFIG).is_file():
        raise ConfigError(
            f"{args.run}: none of {CONFIG} (a run), {SIMULATION} (`lobra simulate`) and {ABOUT} "
            "(an experiment) is in it, nor in a folder directly below it"
        )
    print_run_report(args.run)
    parts = run_parts(args.run)
    if args.plots:
        for path in plot_run(args.run, parts):
            print(f"written: {path}")
    if args.trace:
        print(f"written: {write_trace(args.run, parts)}")
    return 0
