"""`lobra profile time | memory | fit`: what layouts cost, measured or estimated, and how well.

One module a subcommand; each holds its arguments and what it does.
"""

from __future__ import annotations

import argparse

from lobra.commands import profile_fit as fit_cli
from lobra.commands import profile_memory as memory_cli
from lobra.commands import profile_time as time_cli
from lobra.commands.profile_options import make_console

TIME = """\
Times one transformer layer, forward + backward with LoRA, for a few micro-batch shapes of each tp;
embedding and head; and, with several ranks, their messages. Every row is on disk as soon as it is
measured: after a crash or Ctrl-C the same command goes on where it was.

  lobra profile time --model tiny --tp 1,2 --trainer-config quickstart
  lobra profile time --model 7B --tp 1,2,4,8 --estimate --accelerator A100-40GB

Writes exp_result/profile/cost_model/profile_{time,head,collectives}_MODEL.csv and beside each a
.meta.json that says how it was made."""
MEMORY = """\
Finds, for every layout <tp,pp> of at most --num-gpus ranks, the most tokens a micro-batch may hold
(in steps of 256). Every trial trains in processes of its own, so running out of memory ends the
trial only. After a crash or Ctrl-C the same command goes on where it was.

  lobra profile memory --model tiny --num-gpus 4 --trainer-config quickstart --memory-budget 84MB
  lobra profile memory --model 70B --num-gpus 64 --trainer-config exp_task12 --estimate \\
      --accelerator A800-80GB

Writes exp_result/profile/memory/max_tokens_MODEL_Ntasks.csv and its .meta.json."""
FIT = """\
Says how far the cost model can be trusted: its errors on rows and on whole lengths it has not seen,
which rows look wrong, and LobRA's six coefficients beside it. Ends 1 if the fit is refused."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three profilers as subcommands."""
    commands = parser.add_subparsers(dest="profiler", required=True, metavar="time|memory|fit")
    for name, module, help_text, description in (
        ("time", time_cli, "time of one layer per tp and micro-batch shape", TIME),
        ("memory", memory_cli, "tokens a micro-batch may hold per layout", MEMORY),
        ("fit", fit_cli, "the cost model's error on rows it has not seen", FIT),
    ):
        module.add_arguments(
            commands.add_parser(
                name,
                help=help_text,
                description=description,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )


def run(args: argparse.Namespace) -> int:
    """Run the chosen profiler and return the exit code."""
    commands = {"time": time_cli.run, "memory": memory_cli.run, "fit": fit_cli.run}
    try:
        code: int = commands[args.profiler](args)
    except KeyboardInterrupt:
        if args.profiler != "fit":
            make_console().print(
                "what was measured is on disk: the same command goes on from there"
            )
        raise
    return code
