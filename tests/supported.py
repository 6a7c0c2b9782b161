"""The table "what is supported" of the README, from what the tests are given.

`python -m tests.supported` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lobra.layout.base_precision import QUANTISED
from tests.model.support import FAMILIES
from tests.trainer.test_more_than_linears import CASES
from tests.trainer.test_preferences import PARAMETERS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- written by python -m tests.supported -->", "<!-- end of it -->"

Test = Callable[[Mapping[str, Any]], bool]

#: What a task of the tests shows of its family.
SHOWN: Mapping[str, Test] = {
    "LoRA+": lambda task: "loraplus_ratio" in task,
    "rsLoRA": lambda task: task.get("adapter") == "rslora",
    "DoRA": lambda task: task.get("adapter") == "dora",
    "VeRA": lambda task: task.get("adapter") == "vera",
    "head": lambda task: "lm_head" in task["target_modules"],
    "embedding": lambda task: "embed_tokens" in task["target_modules"],
    "norms": lambda task: "modules_to_save" in task,
    "biases": lambda task: "bias" in task,
}
#: What tests show of every family, as they are given all.
OF_ALL = ("LoRA", "PiSSA")
PRECISIONS = ("fp32", "bf16")


def table() -> str:
    """Return the table as the README has it."""
    columns = [*OF_ALL, *SHOWN, *PRECISIONS, *QUANTISED]
    lines = ["| `model_type` | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for family in FAMILIES:
        cells = [True] * len(OF_ALL)
        cells += [any(map(test, CASES[family])) for test in SHOWN.values()]
        cells += [True] * len((*PRECISIONS, *QUANTISED))
        words = ["yes" if cell else "-" for cell in cells]
        lines.append(f"| `{family}` | " + " | ".join(words) + " |")
    objectives = ", ".join(("supervised", *PARAMETERS))
    return "\n".join([BEGIN, *lines, "", f"Objectives: {objectives}.", END])


def written(text: str) -> str:
    """Return the README with the table as it is now."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
