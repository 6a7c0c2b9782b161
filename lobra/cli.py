"""The `lobra` command: every command is a typed function, imported only when it is asked for.

A command's options are its parameters and the fields of the dataclasses it takes
(`common.options`); their names, types, defaults and docstrings are all that is written of them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from lobra.commands.help_format import PlainHelp
from lobra.common.errors import ConfigError, MachineError, Problems, did_you_mean
from lobra.common.version import installed_version
from lobra.layout.base_precision import quieten_library
from lobra.model.rank_results import RankError

EXIT_OK, EXIT_FAILURE, EXIT_USER_MISTAKE, EXIT_INTERRUPTED = 0, 1, 2, 130

#: Of each command, of one word or two, where its function is and one line of help.
COMMANDS: dict[str, tuple[str | None, str]] = {
    "init": ("lobra.commands.init:init", "write a task file with every field explained"),
    "schema": ("lobra.commands.schema:schema", "the JSON Schema of task files or plans"),
    "data": (None, "look at a task's rows as the model sees them, or fetch data"),
    "data show": ("lobra.commands.data_show:show", "rows as the model will see them"),
    "data fetch": ("lobra.commands.data_fetch:fetch_all", "fetch LobRA's public data sets"),
    "profile": (None, "measure what layouts cost on this machine"),
    "profile time": (
        "lobra.commands.profile_time:profile_time",
        "time of one layer per tp and micro-batch shape",
    ),
    "profile memory": (
        "lobra.commands.profile_memory:profile_memory",
        "tokens a micro-batch may hold per layout",
    ),
    "profile fit": (
        "lobra.commands.profile_fit:profile_fit",
        "the cost model's error on rows it has not seen",
    ),
    "plan": ("lobra.commands.plan:plan", "choose which replicas to deploy"),
    "simulate": ("lobra.commands.simulate:simulate", "run a plan's steps under the cost model"),
    "train": ("lobra.commands.train:train", "train every task's adapter on a plan"),
    "tasks": (None, "tasks join and leave a run while it trains"),
    "tasks add": ("lobra.commands.tasks:add", "have tasks join a run"),
    "tasks cancel": ("lobra.commands.tasks:cancel", "have tasks leave a run, exported"),
    "tasks list": ("lobra.commands.tasks:show", "the tasks of a run, and what is asked of it"),
    "serve": ("lobra.commands.serve:serve", "let tenants train through Tinker's API"),
    "keys": (None, "who may use a service"),
    "keys add": ("lobra.commands.keys:add", "add a tenant and print its key"),
    "keys revoke": ("lobra.commands.keys:revoke", "let a tenant's key open nothing any more"),
    "keys list": ("lobra.commands.keys:show", "list the tenants"),
    "keys delete-data": ("lobra.commands.keys:delete_data", "delete all of a tenant but its key"),
    "backup": ("lobra.commands.backup:backup", "copy a service's state folder"),
    "report": ("lobra.commands.report:report", "tables and plots of a run or a simulation"),
    "generate": ("lobra.commands.generate:generate", "what adapters make of a prompt"),
    "export": ("lobra.commands.export:export", "a model with adapters merged into it"),
    "experiment": (None, "LobRA's published experiments"),
    "experiment simulate": ("lobra.commands.experiment:simulate", "by simulation, without GPUs"),
    "experiment real": ("lobra.commands.experiment:real", "the real jobs, on a cluster's GPUs"),
    "experiment page": ("lobra.commands.experiment:page", "write the page of results"),
    "doctor": ("lobra.commands.doctor:doctor", "what this machine has and lacks"),
}
#: What a base installation leaves out (the extra "train" of setup.py), as it is imported.
TRAIN_PACKAGES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "peft"),
    *("pyarrow", "jinja2", "huggingface_hub", "tensorboard"),
)
INSTALL_TRAIN = (
    "needed to measure, to train and to read data sets: pip install 'lobra[train]' (in a checkout: "
    "pip install -e '.[train]'); lobra plan --lengths, simulate and report do without"
)
#: Options that are another spelling of one with a value.
ALIASES = {"--gradient-checkpointing": "--memory=full"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lobra <command> ...` and return its exit code (0, 1, 2 or 130)."""
    if argv is None:
        _keep_working_folder_out()
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: run(lobra_app(" ".join(words[:2])), words))


def lobra_app(asked: str = "", commands: Mapping[str, tuple[str | None, str]] = COMMANDS) -> App:
    """Return the command, with its subcommands by name only; the one asked for tells its help."""
    top = make_app(
        name="lobra",
        help="Multi-tenant LoRA fine-tuning on heterogeneous parallel layouts.\n\n"
        "`lobra <command> --help` explains each command.",
        version=f"lobra {installed_version()}",
    )
    apps = {"": top}
    for place, (name, (path, line)) in enumerate(commands.items()):
        parent, _, word = name.rpartition(" ")
        if path is None:
            apps[name] = make_app(name=word, help=line, version_flags=(), sort_key=place)
            apps[parent].command(apps[name])
        else:
            own = f"{asked} ".startswith(f"{name} ")
            apps[parent].command(
                path, name=word, help=None if own else line, sort_key=place, version_flags=()
            )
    top.command(
        "lobra.commands.completion:install_completion",
        name="--install-completion",
        help="have the shell complete commands and options",
        sort_key=len(COMMANDS),
        version_flags=(),
    )
    return top


def make_app(**settings: Any) -> App:
    """Return an application that behaves as every command of ours does.

    Nothing is an option but what is declared (no ``--no-...``), of an option given twice the last
    counts, and errors are raised, not printed.
    """
    app = App(
        default_parameter=Parameter(negative=(), allow_repeating=True),
        help_format="plaintext",
        help_formatter=PlainHelp(),
        group_parameters="Options",
        suppress_keyboard_interrupt=False,
        **settings,
    )
    for flag in app.help_flags:
        app[flag].show = False
    return app


def run(app: App, words: Sequence[str]) -> int:
    """Run the command that the words of a command line ask for (`parsed`); return its exit code."""
    command = parsed(app, [ALIASES.get(word, word) for word in words])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quieten_library()
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    code = command()
    if code is None:  # a text was shown, asked for or instead of a command that is missing
        return EXIT_OK if {"--help", "-h", "--version"} & set(words) else EXIT_USER_MISTAKE
    return int(code)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether DeepSpeed says more than that it found no GPU, whatever it is imported for."""
    return "Setting accelerator to CPU" not in record.getMessage()


def parsed(app: App, words: Sequence[str]) -> Callable[[], Any]:
    """Return the command that the words of a command line ask for, with the arguments they give.

    Raises
    ------
    ConfigError
        If they are no command, or its options are not.
    """
    _empty_words(words).raise_if_any()
    try:
        command, given, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise ConfigError(_explained(error)) from None
    _long_names(given.arguments).raise_if_any()
    return partial(command, *given.args, **given.kwargs)


def _long_names(values: Mapping[str, Any]) -> Problems:
    """Return which paths among values, or of dataclasses among them, no file can have."""
    problems = Problems()
    for value in values.values():
        if is_dataclass(value):
            problems += _long_names(vars(value))
        for path in value if isinstance(value, tuple) else (value,):
            try:
                if isinstance(path, Path):
                    path.lstat()
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    problems.add(f"{path}: {error.strerror}")
    return problems


def _empty_words(words: Sequence[str]) -> Problems:
    """Return which values of a command line are empty: a path of none would be the folder here."""
    problems = Problems()
    for before, word in pairwise(("", *words)):
        is_option = word.startswith("--") and "=" in word
        option, _, value = word.partition("=") if is_option else (before, "", word)
        if not value.strip():
            name = option if option.startswith("--") else "an argument"
            problems.add(f"{name}: is empty, want a value, or leave it out")
    return problems


def _explained(error: CycloptsError) -> Problems:
    """Return what is wrong with a command line: one mistake, or all that is missing or unknown."""
    error.verbose = False
    if isinstance(error, UnknownCommandError):  # its own message would import every command
        parents, word = list(error.command_chain or ()), (error.unused_tokens or [""])[0]
        there = [name.split()[-1] for name in COMMANDS if name.split()[:-1] == parents]
        return Problems([f"{word}: no such command{did_you_mean(word, there)}; see --help"])
    if type(error) is UnusedCliTokensError:
        return Problems([f"not expected here: {' '.join(error.unused_tokens or ())}"])
    is_missing = type(error) is MissingArgumentError and not error.keyword
    if (is_missing or type(error) is UnknownOptionError) and error.app:
        words = {word.partition("=")[0] for word in error.root_input_tokens or ()}
        place = error.argument.index if is_missing and error.argument else None
        if wrong := _wrong_options(error.app, words, place):
            return wrong
    return Problems([str(error)])


def _wrong_options(app: App, words: set[str], missing: int | None) -> Problems:
    """Return which arguments of a command are missing, and which words are no options of it.

    Those that are told by their place are missing from the place ``missing`` on; None: none is.
    """
    options = app.assemble_argument_collection()
    known = [option.name for option in options]
    problems = Problems()
    for option in options:
        if not option.parse or not option.required or option.children:
            continue
        if option.index is None and option.name not in words:
            problems.add(f"{option.name}: is required")
        elif option.index is not None and missing is not None and option.index >= missing:
            problems.add(f"{option.name.lstrip('-').upper()}: is required")
    problems += [
        f"{word}: no such option{did_you_mean(word, known)}"
        for word in sorted(words)
        if word.startswith("--") and word not in known
    ]
    return problems


def _keep_working_folder_out() -> None:
    """Have the Pythons this command starts (ranks, launchers) import from where this one does.

    The installed command does not see modules of the working folder, but `python -c` and
    `python -m` do: a `tokenizers.py` or `signal.py` there would take a library's place.
    """
    with contextlib.suppress(FileNotFoundError):  # the working folder was removed
        if not {"", os.getcwd()} & set(sys.path):
            os.environ.setdefault("PYTHONSAFEPATH", "1")


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Have an interruption tell that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.add_note("what is finished is on disk: the same command goes on from there")
        raise


def guarded(run: Callable[[], int], name: str = "lobra") -> int:
    """Return `run()`; turn errors into messages and exit codes.

    A user's mistake is printed without a traceback (2), so is that training needs packages that a
    base installation leaves out; Ctrl-C ends with 130. What the machine denies is printed without
    a traceback, anything else with it (a rank's failure with the rank's), and ends with 1. Messages
    begin with `name`.
    """
    try:
        return run()
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except KeyboardInterrupt as interruption:
        notes = getattr(interruption, "__notes__", ())
        print(f"{name}: {'; '.join(['interrupted', *notes])}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except (MachineError, RankError) as error:  # the latter carries the rank's own traceback
        print("\n".join([f"{name}: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return EXIT_FAILURE
    except Exception as error:
        if missing := missing_package(error):
            print(f"{name}: {missing} is not installed; {INSTALL_TRAIN}", file=sys.stderr)
            return EXIT_USER_MISTAKE
        traceback.print_exc()
        return EXIT_FAILURE


def missing_package(error: BaseException | None) -> str | None:
    """Return the package of the extra `train` for want of which this was raised, or None."""
    while error is not None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in TRAIN_PACKAGES:
            return package
        error = error.__cause__
    return None


if __name__ == "__main__":
    sys.exit(main())
