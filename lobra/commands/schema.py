"""`lobra schema`: the JSON Schema of a file that people write, for their editors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from lobra.common.models import json_schema
from lobra.layout.plan import PlanFile
from lobra.tasks.task_file import TaskFile

Kind = Literal["tasks", "plan"]
MODELS: Mapping[Kind, type] = {"tasks": TaskFile, "plan": PlanFile}


def schema(kind: Kind, /) -> int:
    """Print the JSON Schema (draft 2020-12) of a kind of files.

    An editor with a YAML or JSON language server checks and completes a file by it.

    Parameters
    ----------
    kind
        Task files or plans.
    """
    print(json.dumps(json_schema(MODELS[kind]), indent=2))
    return 0
