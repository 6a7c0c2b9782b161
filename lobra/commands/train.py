"""`lobra train`: arguments, environment variables and the final table."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NoReturn

from lobra.commands.memory_options import add_memory_options, memory_problems
from lobra.common.errors import ConfigError
from lobra.layout.plan import load_plan
from lobra.model.launch import Interrupted
from lobra.report.run_report import print_run_report
from lobra.trainer.checkpoint import step_folder
from lobra.trainer.launcher import run_launcher
from lobra.trainer.metrics import METRICS_FILE
from lobra.trainer.prepare import TrainRequest
from lobra.trainer.run import (
    Refusal,
    in_launcher,
    launcher_command,
    restart_with,
    train,
    train_in_launcher,
)
from lobra.trainer.signals import EXIT_CODES

LAST_CHECKPOINT = -1
POSITIVE = (
    "max_steps",
    "max_seq_length",
    "num_buckets",
    "gpus_per_node",
    "keep_last",
    "num_tasks",
    "num_gpus",
)
HARMLESS = {"num_buckets": 16, "seed": 0, "save_every": 0, "keep_last": 3}  # others: None
NOT_NEGATIVE = ("seed", "save_every", "validate_every")
Mode = Literal["balance", "group"]
DYNAMIC_BUCKETS = {"TRUE": True, "FALSE": False}
DISPATCH_MODES: dict[str, Mode] = {"BALANCE": "balance", "GROUP": "group"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lobra train` (CONTRACT.md)."""
    parser.add_argument("--model", required=True, help="tiny, 7B, ... or a Hugging Face folder")
    parser.add_argument("--trainer-config", required=True, help="name or path of the task set")
    parser.add_argument("--strategy-config", required=True, help="name or path of the plan")
    parser.add_argument("--output-dir", required=True, type=Path, help="the run's folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets lie")
    parser.add_argument("--num-gpus", type=int, help="refuse a plan with more ranks")
    parser.add_argument("--num-tasks", type=int, help="use the first N tasks only")
    parser.add_argument("--max-steps", type=int, help="end after N steps even if tasks want more")
    parser.add_argument("--max-seq-length", type=int, help="cut every task's context_length to N")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp64"),
        help="default: fp32 on CPU, bf16 on GPU; fp64, everything included, is for proofs: slow",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dp-bucket", choices=("on", "off"), help="bucket every step anew (env DP_BUCKET)"
    )
    parser.add_argument("--num-buckets", type=int, default=16)
    parser.add_argument("--dispatch", choices=("balance", "group"), help="(env EXPR_DATA_DISPATCH)")
    parser.add_argument("--seed", type=int, default=0, help="added to every task's own seed")
    add_memory_options(parser, None, "of every replica (default: as the plan says)")
    parser.add_argument(
        "--feedback",
        choices=("on", "off"),
        help="let measured replica times correct the dispatcher (default: on for GPUs; off on "
        "CPU, where a run is then reproducible bit for bit)",
    )
    parser.add_argument(
        "--validate-every",
        type=int,
        help="steps between validation losses (default: 10 if a task validates or may stop early)",
    )
    parser.add_argument("--save-every", type=int, default=0, help="checkpoint every N steps")
    parser.add_argument("--keep-last", type=int, default=3, help="checkpoints to keep")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=int,
        const=LAST_CHECKPOINT,
        metavar="STEP",
        help="go on from a checkpoint of --output-dir (default: the last), on any plan",
    )
    parser.add_argument("--time-profile", type=Path, help="CSV; default: the model's own profile")
    parser.add_argument("--cost-model", choices=("fitted", "lobra6"), default="fitted")
    parser.add_argument(
        "--revive",
        action="append",
        metavar="TASK",
        help="with --resume: let this stopped task go on (give it once per task)",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        help="default: what the launcher started on a host, else the GPUs of this machine",
    )
    parser.add_argument("--server-addr", help="address of the first host (with --host-file)")
    parser.add_argument("--server-port", type=int, help="port on the first host")
    parser.add_argument("--host-file", type=Path, help="DeepSpeed host file for several machines")
    parser.add_argument("--env-file", type=Path, help="sourced on every host before starting")


def run(args: argparse.Namespace) -> int:
    """Run `lobra train` and return its exit code."""
    if args.env_file is not None:
        restart_with(args.env_file)
    mistakes = check_values(args)
    dynamic_buckets, dispatch_mode = True, DISPATCH_MODES["BALANCE"]
    try:
        dynamic_buckets, dispatch_mode = read_switches(os.environ)
    except ConfigError as error:
        mistakes += error.problems
    if args.dp_bucket is not None:
        dynamic_buckets = args.dp_bucket == "on"
    if args.host_file is not None and not in_launcher():
        return _through_launcher(args, mistakes)
    request = TrainRequest(
        model=args.model,
        trainer_config=args.trainer_config,
        strategy_config=args.strategy_config,
        output_dir=args.output_dir,
        data_dir=args.data_dir,
        num_gpus=args.num_gpus,
        num_tasks=args.num_tasks,
        max_steps=args.max_steps,
        max_seq_length=args.max_seq_length,
        precision=args.precision,
        device=args.device,
        dynamic_buckets=dynamic_buckets,
        num_buckets=args.num_buckets,
        dispatch_mode=args.dispatch or dispatch_mode,
        seed=args.seed,
        time_profile=args.time_profile,
        cost_model=args.cost_model,
        gpus_per_node=args.gpus_per_node,
        memory=args.memory,
        feedback=None if args.feedback is None else args.feedback == "on",
        validate_every=args.validate_every,
        save_every=args.save_every,
        keep_last=args.keep_last,
        resume=args.resume is not None,
        resume_step=None if args.resume in (None, LAST_CHECKPOINT) else args.resume,
        revive=tuple(args.revive or ()),
        mistakes=tuple(mistakes),
    )
    if in_launcher():
        is_first = os.environ["RANK"] == "0"
        try:
            spec, result = train_in_launcher(request)
        except Refusal:
            if is_first:
                raise
            return 2  # rank 0 says why
        except ConfigError as error:
            _leave(str(error), 2)
        except Exception:
            _leave(f"failed\n{traceback.format_exc().rstrip()}", 1)
        if not is_first:
            return EXIT_CODES.get(result.stop_signal or 0, 0)
    else:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        try:
            spec, results = train(request)
        except Interrupted as error:
            print(f"lobra: {error} before the first step; nothing to save", file=sys.stderr)
            return EXIT_CODES[error.signal]
        result = results[0]
    if (spec.output_dir / METRICS_FILE).is_file():
        print_run_report(spec.output_dir)
    if result.stopped_at is None:
        return 0
    folder = step_folder(spec.output_dir, result.stopped_at)
    print(f"stopped; saved {folder}; go on with the same command and --resume", file=sys.stderr)
    return EXIT_CODES.get(result.stop_signal or 0, 1)


def _leave(message: str, code: int) -> NoReturn:
    """Say why this rank fails and end its process at once.

    To end in good order would be to wait for ranks that wait for this one.
    """
    print(f"lobra: rank {os.environ['RANK']} on {platform.node()}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_values(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the values given, and put harmless ones in their place.

    So the files can be checked too, and all mistakes be reported together.
    """
    problems = []
    for name, least, wanted in (
        *((name, 1, "must be at least 1") for name in POSITIVE),
        *((name, 0, "must not be negative") for name in NOT_NEGATIVE),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')} {value}: {wanted}")
            setattr(args, name, HARMLESS.get(name))
    if wrong := memory_problems(args.memory):
        problems += wrong
        args.memory = None
    if args.resume is not None and args.resume < 0 and args.resume != LAST_CHECKPOINT:
        problems.append(f"--resume {args.resume}: must not be negative")
        args.resume = LAST_CHECKPOINT
    return problems


def _through_launcher(args: argparse.Namespace, mistakes: list[str]) -> int:
    """Start deepspeed's launcher on the hosts of the host file and return its exit code."""
    command: list[str] = []
    try:
        plan = load_plan(args.strategy_config)
        command = launcher_command(
            sys.argv[2:], args.host_file, plan.num_gpus, args.server_addr, args.server_port
        )
    except ConfigError as error:
        mistakes += error.problems
    if mistakes:
        raise ConfigError(mistakes)
    return run_launcher(command)


def read_switches(environment: Mapping[str, str]) -> tuple[bool, Mode]:
    """Return (DP_BUCKET, EXPR_DATA_DISPATCH): LobRA's environment variables, with its defaults.

    Raises:
        ConfigError: a variable has a value that is not one of its own.
    """
    buckets = environment.get("DP_BUCKET", "TRUE")
    mode = environment.get("EXPR_DATA_DISPATCH", "BALANCE")
    problems = [
        f"{name}={value}: must be one of {', '.join(known)}"
        for name, value, known in (
            ("DP_BUCKET", buckets, list(DYNAMIC_BUCKETS)),
            ("EXPR_DATA_DISPATCH", mode, list(DISPATCH_MODES)),
        )
        if value not in known
    ]
    if problems:
        raise ConfigError(problems)
    return DYNAMIC_BUCKETS[buckets], DISPATCH_MODES[mode]
