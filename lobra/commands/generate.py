"""`lobra generate`: what adapters make of a prompt, side by side."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path

from lobra.commands.adapter_folder import adapter_folder_problem
from lobra.common.errors import ConfigError
from lobra.common.options import (
    Device,
    Json,
    ModelName,
    NonNegativeInt,
    PositiveInt,
    PositiveNumber,
    as_options,
    option_problems,
)
from lobra.model.folder import resolve_folder
from lobra.profiler.hardware import resolve_device

BASE = "base"


@as_options
@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Which adapters are asked what.

    Parameters
    ----------
    adapter
        A folder in PEFT's format, such as runs/NAME/adapters/TASK (repeatable).
    prompt
        A text to go on with, exactly as the model is to see it (repeatable); by default all of
        standard input.
    base
        Also let the base answer, without an adapter.
    max_new_tokens
        The most tokens of an answer.
    temperature
        Draw tokens at this temperature; by default the likeliest is taken.
    seed
        Of the draw.
    """

    model: ModelName
    adapter: tuple[Path, ...] = ()
    prompt: tuple[str, ...] = ()
    base: bool = False
    max_new_tokens: PositiveInt = 64
    temperature: PositiveNumber | None = None
    seed: NonNegativeInt = 0
    device: Device = "auto"
    json: Json = False


def generate(*, options: GenerateOptions) -> int:
    """Let the base go on with a prompt through each adapter in turn.

    An adapter expects the prompts it was trained on: `lobra data show` prints them.

      lobra generate --model tiny --adapter runs/first/adapters/signature --prompt 'def f(' --base

    Raises
    ------
    ConfigError
        With every mistake of the options, the base and the adapters.
    """
    problems = option_problems(options)
    problems += filter(None, map(adapter_folder_problem, options.adapter))
    with problems.noted():
        base = resolve_folder(options.model)
    problems.raise_if_any()
    device = resolve_device(options.device)
    if not options.prompt and sys.stdin.isatty():
        print("the prompt, ended by Ctrl-D on a line of its own:", file=sys.stderr)
    prompts = options.prompt or (sys.stdin.read(),)
    if not all(prompts):
        raise ConfigError("--prompt: is empty; give one, or a text on standard input")
    from lobra.trainer.generation import Sampling, answers  # imports torch and transformers

    chosen = [*([None] if options.base or not options.adapter else []), *options.adapter]
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    told = answers(base, chosen, prompts, sampling, device)
    names = [BASE if folder is None else str(folder) for folder in chosen]
    by_name = list(zip(names, told, strict=True))
    if options.json:
        entries = [
            {"prompt": prompt, "answers": {name: texts[place] for name, texts in by_name}}
            for place, prompt in enumerate(prompts)
        ]
        print(json_format.dumps(entries, ensure_ascii=False, indent=2))
        return 0
    for place, prompt in enumerate(prompts):
        print(f"prompt: {prompt}")
        for name, texts in by_name:
            print(f"--- {name}\n{texts[place]}")
    return 0
