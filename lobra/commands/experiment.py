"""`lobra experiment simulate | real | page`: LobRA's published experiments, of a checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import lobra
from lobra.common.errors import ConfigError

#: What each runs: a module of the folder experiments/ with ``main(arguments) -> exit code``.
STUDIES = {
    "simulate": "experiments.simulate",
    "real": "experiments.jobs",
    "page": "experiments.reproduction",
}
DESCRIPTION = """\
simulate  methods, ablation, buckets, planning times by simulation, without GPUs
real      the real jobs on the GPUs of a cluster: profile, plan, train (--dry-run shows them)
page      fill the tables of docs/reproduction.md

  lobra experiment simulate 7B --output exp_result/expr_7b
  lobra experiment simulate --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lobra experiment`; a study declares its own."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument("study", choices=tuple(STUDIES), metavar="simulate|real|page")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `STUDY --help`")


def run(args: argparse.Namespace) -> int:
    """Run the study and return its exit code.

    Raises
    ------
    ConfigError
        If this is an installation without the folder experiments/.
    """
    root = Path(lobra.__file__).resolve().parent.parent
    if not (root / "experiments" / "simulate.py").is_file():
        raise ConfigError(
            "experiments: are in the project's checkout, not in an installation of it; run the "
            "command in an environment with an editable installation (pip install -e CHECKOUT)"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))
    code: int = importlib.import_module(STUDIES[args.study]).main(args.arguments)
    return code
