"""`lobra profile time | memory | fit`: what layouts cost, measured or estimated, and how well.

One module a subcommand; each holds its arguments and what it does.
"""

from __future__ import annotations

import argparse

from profiler import fit_cli, memory_cli, time_cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three profilers as subcommands."""
    commands = parser.add_subparsers(dest="profiler", required=True, metavar="time|memory|fit")
    time_cli.add_arguments(
        commands.add_parser("time", help="time of one layer per tp and micro-batch shape")
    )
    memory_cli.add_arguments(
        commands.add_parser("memory", help="tokens a micro-batch may hold per layout")
    )
    fit_cli.add_arguments(
        commands.add_parser("fit", help="the cost model's error on rows it has not seen")
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen profiler and return the exit code."""
    commands = {"time": time_cli.run, "memory": memory_cli.run, "fit": fit_cli.run}
    code: int = commands[args.profiler](args)
    return code
