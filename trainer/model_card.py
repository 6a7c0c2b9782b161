"""The README.md of an exported adapter, with what the hub and PEFT's own cards say in its head."""

from __future__ import annotations

import yaml

from lobra.tasks.config import TaskConfig
from lobra.trainer.task_progress import TaskProgress

#: What a task file's `adapter` is called.
METHODS = {"lora": "LoRA", "rslora": "rsLoRA", "pissa": "PiSSA", "dora": "DoRA", "vera": "VeRA"}

TEMPLATE = """\
---
{head}---

# {name}

{what}, trained by LobRA-on-DeepSpeed.

| | |
|---|---|
{rows}

```python
{usage}
```
"""
OF_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "this folder")"""
OF_MODEL = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")"""


def model_card(task: TaskConfig, base_model: str, precision: str, progress: TaskProgress) -> str:
    """Return the card of a task's adapter.

    Parameters
    ----------
    task
        What was trained.
    base_model
        What the adapter calls its base.
    precision
        What the base's linears are kept in.
    progress
        How far it has come.
    """
    is_model = task.trains_model
    tags = [f"base_model:adapter:{base_model}", "lora", "transformers"]
    head = {
        "base_model": base_model,
        "library_name": "transformers" if is_model else "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:finetune:{base_model}"] if is_model else tags,
    }
    of_adapter = {
        "rank, lora_alpha, dropout": f"{task.rank}, {task.lora_alpha:g}, {task.lora_dropout:g}",
        "target modules": ", ".join(task.target_modules),
    }
    facts = {
        **({} if is_model else of_adapter),
        "data": ", ".join(task.dataset_names),
        "context length": f"{task.context_length} tokens",
        "sequences a step": str(task.global_batch_size),
        "learning rate": f"{task.learning_rate:g}, {task.lr_scheduler}",
        "precision of the base": precision,
        **_outcome(progress),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return TEMPLATE.format(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        name=task.name,
        what=f"`{base_model}`, all of its weights"
        if is_model
        else f"{METHODS[task.adapter]} adapter of `{base_model}`",
        usage=OF_MODEL if is_model else OF_ADAPTER.format(base=base_model),
        rows=rows,
    )


def _outcome(progress: TaskProgress) -> dict[str, str]:
    """Return what a task's steps have to tell, as far as it is known."""
    losses = progress.losses
    facts = {"steps": str(progress.steps)}
    if losses.first_step:
        facts["loss per token"] = (
            f"{_number(losses.first)} in step {losses.first_step}, "
            f"{_number(losses.last)} in step {losses.last_step}"
        )
    if losses.held_out is not None and losses.lowest_held_out is not None:
        facts["held-out loss per token"] = (
            f"{losses.held_out:.4f}, at best {losses.lowest_held_out:.4f}"
        )
    if progress.stopped:
        facts["ended early"] = progress.stopped
    return facts


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
