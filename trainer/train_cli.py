"""`lobra train`: arguments, environment variables and the final table."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from planner.plan import load_plan
from tasks.errors import ConfigError
from trainer.prepare import TrainRequest
from trainer.report import print_run_report
from trainer.run import (
    in_launcher,
    launcher_command,
    restart_with,
    run_launcher,
    train,
    train_in_launcher,
)

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
    parser.add_argument("--train-task-num", type=int, help="use the first N tasks only")
    parser.add_argument("--max-steps", type=int, help="end after N steps even if tasks want more")
    parser.add_argument("--max-seq-length", type=int, help="cut every task's context_length to N")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: fp32 on CPU, bf16 on GPU"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dp-bucket", choices=("on", "off"), help="bucket every step anew (env DP_BUCKET)"
    )
    parser.add_argument("--num-buckets", type=int, default=16)
    parser.add_argument("--dispatch", choices=("balance", "group"), help="(env EXPR_DATA_DISPATCH)")
    parser.add_argument("--seed", type=int, default=0, help="added to every task's own seed")
    parser.add_argument("--time-profile", type=Path, help="CSV; default: the model's own profile")
    parser.add_argument("--cost-model", choices=("fitted", "lobra6"), default="fitted")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--server-addr", help="address of the first host (with --host-file)")
    parser.add_argument("--server-port", type=int, help="port on the first host")
    parser.add_argument("--host-file", type=Path, help="DeepSpeed host file for several machines")
    parser.add_argument("--env-file", type=Path, help="sourced on every host before starting")


def run(args: argparse.Namespace) -> int:
    """Run `lobra train` and return its exit code."""
    if args.env_file is not None:
        restart_with(args.env_file)
    dynamic_buckets, dispatch_mode = read_switches(os.environ)
    if args.dp_bucket is not None:
        dynamic_buckets = args.dp_bucket == "on"
    problems = [
        f"--{name.replace('_', '-')} {value}: must be at least 1"
        for name in ("max_steps", "max_seq_length", "num_buckets", "gpus_per_node")
        if (value := getattr(args, name)) is not None and value < 1
    ]
    if args.seed < 0:
        problems.append(f"--seed {args.seed}: must not be negative")
    if problems:
        raise ConfigError(problems)
    if args.host_file is not None and not in_launcher():
        plan = load_plan(args.strategy_config)
        command = launcher_command(
            sys.argv[2:], args.host_file, plan.num_gpus, args.server_addr, args.server_port
        )
        return run_launcher(command)
    request = TrainRequest(
        model=args.model,
        trainer_config=args.trainer_config,
        strategy_config=args.strategy_config,
        output_dir=args.output_dir,
        data_dir=args.data_dir,
        num_tasks=args.train_task_num,
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
    )
    if in_launcher():
        is_first = os.environ["RANK"] == "0"
        try:
            spec, _ = train_in_launcher(request)
        except ConfigError:
            if is_first:
                raise
            return 2  # rank 0 has said why
        if not is_first:
            return 0
    else:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        spec, _ = train(request)
    print_run_report(spec.output_dir)
    return 0


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
