"""The README.md of an exported adapter, with what the hub and PEFT's own cards say in its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from lobra.tasks.config import TaskConfig

#: What a task file's `adapter` is called.
METHODS = {"lora": "LoRA", "rslora": "rsLoRA", "pissa": "PiSSA", "dora": "DoRA", "vera": "VeRA"}

TEMPLATE = """\
---
{head}---

# {name}

{method} adapter of `{base}`, trained by LobRA-on-DeepSpeed.

| | |
|---|---|
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def model_card(
    task: TaskConfig,
    base_model: str,
    precision: str,
    steps: Sequence[dict[str, Any]],
) -> str:
    """Return the card of a task's adapter.

    Parameters
    ----------
    task
        What was trained.
    base_model
        What the adapter calls its base.
    precision
        What the base's linears are kept in.
    steps
        The lines of the run's metrics.
    """
    head = {
        "base_model": base_model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{base_model}", "lora", "transformers"],
    }
    facts = {
        "rank, lora_alpha, dropout": f"{task.rank}, {task.lora_alpha:g}, {task.lora_dropout:g}",
        "target modules": ", ".join(task.target_modules),
        "data": ", ".join(task.dataset_names),
        "context length": f"{task.context_length} tokens",
        "sequences a step": str(task.global_batch_size),
        "learning rate": f"{task.learning_rate:g}, {task.lr_scheduler}",
        "precision of the base": precision,
        **_outcome([step["tasks"][task.name] for step in steps if task.name in step["tasks"]]),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return TEMPLATE.format(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        name=task.name,
        method=METHODS[task.adapter],
        base=base_model,
        rows=rows,
    )


def _outcome(steps: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return what a task's steps have to tell, of those that are known."""
    if not steps:
        return {}
    first, last = steps[0], steps[-1]
    # Logs of older versions do not tell the task's own step: it is the line's place.
    begin, end = first.get("own_step", 0) + 1, last.get("own_step", len(steps) - 1) + 1
    facts = {
        "steps": str(end),
        "loss per token": f"{_number(first['loss'])} in step {begin}, "
        f"{_number(last['loss'])} in step {end}",
    }
    held_out = [loss for step in steps if (loss := step.get("validation_loss")) is not None]
    if held_out:
        facts["held-out loss per token"] = f"{_number(held_out[-1])}, at best {min(held_out):.4f}"
    if last.get("stopped"):
        facts["ended early"] = last["stopped"]
    return facts


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
