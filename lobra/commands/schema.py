"""`lobra schema`: the JSON Schema of a file that people write, for their editors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from lobra.common.models import json_schema
from lobra.layout.plan import PlanFile
from lobra.tasks.config import TaskFile

MODELS: Mapping[str, type] = {"tasks": TaskFile, "plan": PlanFile}


def schema(kind: str) -> int:
    """Print the JSON Schema (draft 2020-12) of a kind of files, a key of `MODELS`."""
    print(json.dumps(json_schema(MODELS[kind]), indent=2))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("kind", choices=MODELS, help="task files or plans")


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    return schema(args.kind)
