"""The `lobra` command: a thin door to the packages' own command lines.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> exit code`. Only the module
that is asked for is imported, so that `lobra plan` never pays for importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lobra.common.errors import ConfigError
from lobra.common.version import installed_version
from lobra.model.launch import RankError

EXIT_OK, EXIT_FAILURE, EXIT_USER_MISTAKE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """A subcommand: the module that holds it and one line of help."""

    module: str
    help: str


COMMANDS = {
    "init": Command("lobra.commands.init", "write a task file with every field explained"),
    "schema": Command("lobra.commands.schema", "the JSON Schema of task files or plans"),
    "data": Command(
        "lobra.commands.data", "look at a task's rows as the model sees them, or fetch data"
    ),
    "profile": Command("lobra.commands.profile", "measure what layouts cost on this machine"),
    "plan": Command("lobra.commands.plan", "choose which replicas to deploy"),
    "simulate": Command("lobra.commands.simulate", "run a plan's steps under the cost model"),
    "train": Command("lobra.commands.train", "train every task's adapter on a plan"),
    "report": Command("lobra.commands.report", "tables and plots of a run or a simulation"),
    "experiment": Command("lobra.commands.experiment", "LobRA's published experiments"),
    "doctor": Command("lobra.commands.doctor", "what this machine has and lacks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lobra <command> ...` and return its exit code (CONTRACT: 0, 1, 2 or 130)."""
    if argv is None:
        _keep_working_folder_out()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    args, rest = parser.parse_known_args(argv[:1])
    if args.command is None:
        parser.print_help()
        return EXIT_USER_MISTAKE
    return guarded(lambda: _run(args.command, [*rest, *argv[1:]]))


def _keep_working_folder_out() -> None:
    """Have the Pythons this command starts (ranks, launchers) import from where this one does.

    The installed command does not see modules of the working folder, but `python -c` and
    `python -m` do: a `tokenizers.py` or `signal.py` there would take a library's place.
    """
    with contextlib.suppress(FileNotFoundError):  # the working folder was removed
        if not {"", os.getcwd()} & set(sys.path):
            os.environ.setdefault("PYTHONSAFEPATH", "1")


def _run(name: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"lobra {name}", description=command.help.capitalize() + "."
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    code: int = module.run(args)
    return code


def guarded(run: Callable[[], int], name: str = "lobra", what_next: str = "") -> int:
    """Return `run()`; turn errors into the contract's messages and exit codes.

    A user's mistake is printed without a traceback (2), Ctrl-C ends with 130, anything else with
    its traceback and 1 (a rank's failure with the rank's traceback). Messages begin with `name`;
    `what_next` is said after an interruption.
    """
    try:
        return run()
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except KeyboardInterrupt:
        print(f"{name}: interrupted{what_next}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except RankError as error:  # it carries the rank's own traceback; ours says nothing
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lobra",
        description="Multi-tenant LoRA fine-tuning on heterogeneous parallel layouts.",
        epilog=f"commands:\n{listing}\n\n`lobra <command> --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lobra {installed_version()}")
    parser.add_argument("command", nargs="?", choices=tuple(COMMANDS), metavar="command")
    return parser


if __name__ == "__main__":
    sys.exit(main())
