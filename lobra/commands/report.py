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


def report(run: Path, /, *, plots: bool = False, trace: bool = False) -> int:
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
    return 0
