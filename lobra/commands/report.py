"""`lobra report`: tables and plots of what was run or simulated."""

from __future__ import annotations

from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.report.experiment_report import report_experiment
from lobra.report.experiment_tables import ABOUT, SIMULATION, experiments_in
from lobra.report.run_plots import plot_run
from lobra.report.run_report import print_run_report
from lobra.report.run_summary import run_parts
from lobra.report.trace import write_trace
from lobra.trainer.run_config import read_run_config

CONFIG = "config.yaml"


def report(run: Path, /, *, plots: bool = False, trace: bool = False, verify: bool = False) -> int:
    """Print the report of a run, of a simulation or of an experiment.

    Experiments and simulations get their pictures and their page in any case.

    Parameters
    ----------
    run
        Folder of a run, a simulation or an experiment.
    plots
        Write pictures under RUN/report.
    trace
        Write RUN/trace.json (Chrome trace).
    verify
        Check by the log that nothing was trained twice or left out, compute the step after the
        newest checkpoint again, and compare it with what was logged; ends with 1 if anything is
        otherwise.

    Raises
    ------
    ConfigError
        If it is none of them.
    """
    if experiments := experiments_in(run):
        for experiment in experiments:
            for path in report_experiment(experiment):
                print(f"written: {path}")
        return 0
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder")
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"{run}: none of {CONFIG} (a run), {SIMULATION} (`lobra simulate`) and {ABOUT} "
            "(an experiment) is in it, nor in a folder directly below it"
        )
    print_run_report(run)
    parts = run_parts(run)
    if plots:
        for path in plot_run(run, parts, read_run_config(run).known_resumes):
            print(f"written: {path}")
    if trace:
        print(f"written: {write_trace(run, parts)}")
    return max(_check_ledger(run), _verify(run)) if verify else 0


def _check_ledger(run: Path) -> int:
    """Print what is wrong with a run's ledger; return 0 if nothing is, else 1."""
    from lobra.trainer.ledger import check_ledger  # a base installation has no torch

    found = check_ledger(run)
    print(f"\nledger: {found.batches} batches of {found.examples} examples")
    for problem in found.problems:
        print(f"  {problem}")
    if not found.problems:
        print("nothing was trained twice or left out")
    return 1 if found.problems else 0


def _verify(run: Path) -> int:
    """Print a step computed again beside what was logged; return 0 if they are the same, else 1."""
    from lobra.trainer.verify import verify  # a base installation has no torch

    found = verify(run)
    errors = [value.error for value in found.values]
    print(f"\nstep {found.step}, computed again from the checkpoint before it:")
    for value in found.values:
        if value.error:
            print(
                f"  {value.task}: {value.name} {value.again}, logged {value.logged} "
                f"({value.error:.1e} of it)"
            )
    same = sum(not error for error in errors)
    print(f"{same} of {len(errors)} losses and norms are the same to the last bit")
    if not found.is_true:
        print(f"others differ by more than rounding ({found.tolerance:.0e}): the log is not true")
    return 0 if found.is_true else 1
