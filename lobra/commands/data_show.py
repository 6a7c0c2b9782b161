"""`lobra data show`: rows as the model will see them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lobra.common.errors import ConfigError, did_you_mean
from lobra.common.options import (
    DataDir,
    Json,
    ModelName,
    NonNegativeInt,
    NumTokens,
    TaskSetName,
    as_options,
    option_problems,
)
from lobra.layout.shapes import resolve_shape
from lobra.model.folder import tokenizer_folder
from lobra.tasks.config import TaskConfig
from lobra.tasks.data_report import summary, summary_text
from lobra.tasks.dataset import TokenizedDataset, load_dataset
from lobra.tasks.task_file import clip_context, load_trainer_config
from lobra.tasks.text_processor import TextProcessor
from lobra.tasks.text_rows import MASKED

log = logging.getLogger(__name__)

SHOWN_CHARACTERS = 3000  # of a row, and of each of its parts, unless all of it is asked for


@as_options
@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Whose rows are shown, and how many.

    Parameters
    ----------
    task
        This task only (repeatable).
    rows
        Rows to print of each task.
    full
        Print long rows whole.
    max_seq_length
        Cut every task's context_length to N.
    """

    model: ModelName
    trainer_config: TaskSetName
    task: tuple[str, ...] = ()
    rows: NonNegativeInt = 3
    full: bool = False
    data_dir: DataDir = Path("data")
    max_seq_length: NumTokens | None = None
    json: Json = False


def show(*, options: ShowOptions) -> int:
    """Print the first rows of every task as the model will see them.

    What is learned is green (between {+ and +} where there are no colours), special tokens are
    between ⟦ and ⟧. Before that a table: rows, tokens, the learned share, lengths, what was cut and
    dropped; after it which fields were ignored.

      lobra data show --model tiny --trainer-config quickstart --rows 1

    Raises
    ------
    ConfigError
        With every mistake of the options and the data.
    """
    problems = option_problems(options)
    tasks: Sequence[TaskConfig] = ()
    with problems.noted():
        tasks = load_trainer_config(options.trainer_config, whole_models=True).tasks
    names = [task.name for task in tasks]
    for name in options.task:
        if tasks and name not in names:
            problems.add(
                f"--task {name}: no such task{did_you_mean(name, names)}: there are {names}"
            )
    vocab_size, refused = None, bool(problems)
    with problems.noted():
        vocab_size = resolve_shape(options.model).vocab_size
    if refused:  # data are looked at with all that is wrong of them, but not in vain
        problems.raise_if_any()
    if options.task:
        tasks = [task for task in tasks if task.name in options.task]
    processor = TextProcessor.of_folder(lambda: tokenizer_folder(options.model))
    datasets = []
    for task in clip_context(tasks, options.max_seq_length):
        with problems.noted():
            datasets.append(load_dataset(task, processor, options.data_dir, vocab_size))
    problems.raise_if_any()
    try:
        processor.tokenizer  # noqa: B018 (loaded now, if it was not needed so far)
    except ConfigError as error:
        log.warning("texts are shown as token ids: %s", error)
    if options.json:
        shown = zip(summary(datasets), datasets, strict=True)
        print(
            json.dumps(
                {
                    "tasks": [
                        {**entry, "examples": list(_as_json(data, processor, options.rows))}
                        for entry, data in shown
                    ]
                },
                ensure_ascii=False,
            )
        )
        return 0
    console = Console(highlight=False, soft_wrap=True)
    print(summary_text(datasets))
    for data in datasets:
        _print_task(console, data, processor, options.rows, options.full)
    return 0


def _examples(data: TokenizedDataset, count: int) -> Iterator[tuple[str, int, Any, Any]]:
    """Yield (place, length before cutting, tokens, learned) of a data set's first sequences."""
    assert data.report is not None
    for index, (place, full_length) in enumerate(data.report.origins[:count]):
        tokens, labels = data.sequence(index)
        yield place, full_length, tokens, labels != MASKED


def _parts(processor: TextProcessor, tokens: Any, learned: Any) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, whether it is learned, whether it is a special token) of a sequence's parts.

    Every special token is a part of its own. Where there is no tokenizer, texts are token ids.
    """
    try:
        tokenizer = processor.tokenizer
        special = sorted(processor.encoder.special_ids)
    except ConfigError:
        tokenizer, special = None, []
    is_special = np.isin(tokens, special)
    done = 0
    for end in range(1, len(tokens) + 1):
        goes_on = end < len(tokens) and learned[done] == learned[end]
        if goes_on and not is_special[done] and not is_special[end]:
            continue
        if tokenizer is None:
            text = " ".join(map(str, tokens[done:end])) + " "
        else:
            # Decoded with the token before it: by itself a part may lack the space it begins with.
            before = str(tokenizer.decode(tokens[done - 1 : done])) if done else ""
            whole = str(tokenizer.decode(tokens[max(0, done - 1) : end]))
            alone = str(tokenizer.decode(tokens[done:end]))
            text = whole[len(before) :] if whole.startswith(before) else alone
        yield text, bool(learned[done]), bool(is_special[done])
        done = end


def _as_json(
    data: TokenizedDataset, processor: TextProcessor, count: int
) -> Iterator[dict[str, Any]]:
    for place, full_length, tokens, learned in _examples(data, count):
        yield {
            "row": place,
            "input_ids": tokens.tolist(),
            "learned": learned.tolist(),
            "cut_from": full_length if full_length > len(tokens) else None,
            "parts": [
                {"text": text, "learned": is_learned, "special": is_special}
                for text, is_learned, is_special in _parts(processor, tokens, learned)
            ],
        }


def _print_task(
    console: Console, data: TokenizedDataset, processor: TextProcessor, count: int, full: bool
) -> None:
    assert data.report is not None
    marks = ("{+", "+}") if console.no_color or not console.is_terminal else ("", "")
    for place, full_length, tokens, learned in _examples(data, count):
        cut = f", cut from {full_length}" if full_length > len(tokens) else ""
        console.print()
        console.print(
            f"== task {data.report.task.name}, {place}: {len(tokens)} tokens, "
            f"{int(learned.sum())} learned{cut}",
            style="bold",
            markup=False,
        )
        line = Text()
        was_learned = False
        room = len(tokens) * 100 if full else SHOWN_CHARACTERS
        for text, is_learned, is_special in _parts(processor, tokens, learned):
            if room <= 0:
                line.append(" [... there is more, see --full]")
                break
            text = _visible(text)
            room -= len(text)
            if is_learned != was_learned:
                line.append(marks[not is_learned], "green")
                was_learned = is_learned
            style = "green" if is_learned else ""
            if is_special:
                line.append(f"⟦{text}⟧", f"bold {'green' if is_learned else 'magenta'}")
            else:
                line.append(text if full else _shortened(text), style)
        line.append(marks[1] if was_learned else "", "green")
        console.print(line)
    for dropped in data.report.first_dropped[:count]:
        console.print(f"== task {data.report.task.name}, dropped: {dropped}", markup=False)


def _visible(text: str) -> str:
    """Return a text without characters that would command the terminal, spelled out instead."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or (c.isspace() and c != "\r") else ascii(c)[1:-1]
        for c in text
    )


def _shortened(text: str) -> str:
    """Return a text with its middle left out, if it is long."""
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {left_out} characters, see --full ...] {text[-half:]}"
