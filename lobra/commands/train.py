"""`lobra train`: options, environment variables and the final table."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from lobra.commands.launched import run_launched
from lobra.common.errors import Problems
from lobra.common.options import (
    THIS_MACHINE,
    LauncherOptions,
    Switch,
    from_environment,
    option_problems,
)
from lobra.layout.plan import Plan, load_plan
from lobra.model.launch import Interrupted
from lobra.report.run_report import print_run_report
from lobra.trainer.arguments import on_plan, with_resume, without_option
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.launcher import launcher_command, run_launcher
from lobra.trainer.log_parts import log_files
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_hosts import RunHosts
from lobra.trainer.signals import EXIT_CODES

log = logging.getLogger(__name__)

DYNAMIC_BUCKETS: Mapping[str, Switch] = {"TRUE": "on", "FALSE": "off"}
DISPATCH_MODES: Mapping[str, Literal["balance", "group"]] = {"BALANCE": "balance", "GROUP": "group"}


def train(
    *,
    request: TrainRequest,
    launcher: LauncherOptions = THIS_MACHINE,
) -> int:
    """Train every task's adapter on a plan.

    Under torchrun or deepspeed their ranks are used. Otherwise one process per rank of the plan is
    started: on this machine or, with --host-file, through deepspeed's launcher.

    Raises
    ------
    ConfigError
        With every mistake of the options, the environment and the files.
    """
    from lobra.trainer.restarts import how_to_go_on
    from lobra.trainer.run import in_launcher, restart_with, train_in_launcher
    from lobra.trainer.run import train as train_here

    if launcher.env_file is not None:
        restart_with(launcher.env_file)
    problems = option_problems(launcher)
    dp_bucket = from_environment("DP_BUCKET", DYNAMIC_BUCKETS, os.environ, problems)
    dispatch = from_environment("EXPR_DATA_DISPATCH", DISPATCH_MODES, os.environ, problems)
    if launcher.host_file is not None and not in_launcher():
        problems += option_problems(request)
        try:
            return _through_launcher(launcher, launcher.host_file, request, problems)
        except Interrupted as error:
            return _end_of(error)
    if request.batching == "packed" and (dp_bucket or dispatch):
        log.warning("DP_BUCKET and EXPR_DATA_DISPATCH are for bucketed micro-batches: no effect")
        dp_bucket = dispatch = None
    request = replace(
        request,
        dp_bucket=request.dp_bucket or dp_bucket,
        dispatch=request.dispatch or dispatch,
        mistakes=tuple(problems),
    )
    if in_launcher():
        remedy = None  # with a host file, who started the launcher says how one goes on
        if launcher.host_file is None:
            remedy = partial(how_to_go_on, request.output_dir)
        outcome = run_launched(lambda: train_in_launcher(request, remedy), remedy)
        if outcome is None:
            return 2
        spec, result = outcome
        if os.environ["RANK"] != "0":
            return EXIT_CODES.get(result.stop_signal or 0, 0)
    else:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        try:
            spec, results = train_here(request)
        except Interrupted as error:
            return _end_of(error)
        result = results[0]
    if result.next_plan is not None:
        print(
            f"the run is to go on on another plan: with the same command, --resume and "
            f"--strategy-config {result.next_plan}; that plan says what is kept, so no --memory",
            file=sys.stderr,
        )
        return 0
    _show_report(spec.output_dir)
    if result.stopped_at is None:
        return 0
    folder = step_folder(spec.output_dir, result.stopped_at)
    print(f"stopped; saved {folder}; go on with the same command and --resume", file=sys.stderr)
    return EXIT_CODES.get(result.stop_signal or 0, 1)


def _end_of(error: Interrupted) -> int:
    """Say how a run that was interrupted goes on; return the exit code."""
    notes = getattr(error, "__notes__", ["before the first step, nothing to save"])
    print(f"lobra: {error}: {'; '.join(notes)}", file=sys.stderr)
    return EXIT_CODES[error.signal]


def _show_report(folder: Path) -> None:
    """Print the run's report; that its lines find no room, or no reader, is no failure of a run."""
    if not log_files(folder):
        return
    try:
        print_run_report(folder)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.warning("the report is not shown (%s): lobra report %s", error.strerror, folder)


def _through_launcher(
    launcher: LauncherOptions, host_file: Path, request: TrainRequest, problems: Problems
) -> int:
    """Start deepspeed's launcher on the hosts of the host file and return its exit code."""
    from lobra.trainer.restarts import launch_with_restarts
    from lobra.trainer.run_folder import occupied
    from lobra.trainer.survivors import plan_on_hosts

    def loaded(plan: Path | None) -> Plan:
        return load_plan(plan or request.strategy_config)

    def command(step: int | None, plan: Path | None) -> list[str]:
        given = sys.argv[2:]
        if step is not None and step != begun:  # later checkpoints have the revived tasks alive
            given = without_option(given, "--revive")
        arguments = with_resume(on_plan(given, plan), step)
        if hosts.lost:  # or the ranks would plan for them
            arguments += ["--num-gpus", str(min(most, sum(hosts.slots.values())))]
        return launcher_command(
            arguments, hosts, loaded(plan).num_gpus, launcher.server_addr, launcher.server_port
        )

    def after_failure(step: int | None, plan: Path | None) -> Path | None:
        now = replace(request, num_gpus=most, resume=None if step is None else (step,))
        if step != begun:
            now = replace(now, revive=())
        if plan is not None:
            now = replace(now, strategy_config=str(plan), memory=None)
        present = loaded(plan)
        plan_anew = partial(plan_on_hosts, now, present, hosts.chosen(present.num_gpus))
        return hosts.after_failure(present, plan_anew) or plan

    begun = request.resume_step or max(list_checkpoints(request.output_dir), default=None)
    with problems.noted():
        hosts = RunHosts.read(host_file, request.await_hosts)
        most = request.num_gpus or loaded(None).num_gpus
        command(None, None)
        hosts.check_answers(loaded(None).num_gpus)
    problems.raise_if_any()
    is_ours = request.is_resumed or not occupied(request.output_dir)  # else the ranks will say so
    restarts = request.max_restarts if is_ours else 0
    return launch_with_restarts(command, run_launcher, request.output_dir, restarts, after_failure)
