"""`lobra data show | fetch`: rows as the model will see them; the published data sets."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lobra.commands import data_fetch as published_cli
from lobra.common.errors import ConfigError, Problems, did_you_mean
from lobra.layout.shapes import resolve_shape
from lobra.model.folder import tokenizer_folder
from lobra.tasks.config import TaskConfig, clip_context, load_trainer_config
from lobra.tasks.data_report import summary, summary_text
from lobra.tasks.dataset import TokenizedDataset, load_dataset
from lobra.tasks.text_processor import TextProcessor
from lobra.tasks.text_rows import MASKED

log = logging.getLogger(__name__)

SHOWN_CHARACTERS = 3000  # of a row, and of each of its parts, unless all of it is asked for
SHOW = """\
Prints the first rows of every task as the model will see them: what is learned is green (between {+
and +} where there are no colours), special tokens are between ⟦ and ⟧. Before that a table: rows,
tokens, the learned share, lengths, what was cut and dropped; after it which fields were ignored.

  lobra data show --model tiny --trainer-config quickstart --rows 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lobra data`."""
    commands = parser.add_subparsers(dest="data", required=True, metavar="show|fetch")
    show = commands.add_parser(
        "show",
        help="rows as the model will see them",
        description=SHOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("--model", required=True, help="tiny, 7B, ... or a Hugging Face folder")
    show.add_argument("--trainer-config", required=True, help="name or path of the task set")
    show.add_argument("--task", action="append", metavar="NAME", help="this task only (repeatable)")
    show.add_argument("--rows", type=int, default=3, help="rows to print of each task (3)")
    show.add_argument("--full", action="store_true", help="print long rows whole")
    show.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets lie")
    show.add_argument("--max-seq-length", type=int, help="cut every task's context_length to N")
    show.add_argument("--json", action="store_true", help="one JSON object on standard output")
    published_cli.add_arguments(
        commands.add_parser("fetch", help="fetch LobRA's public data sets (needs network)")
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand and return the exit code."""
    if args.data == "fetch":
        return published_cli.run(args)
    return show(args)


def show(args: argparse.Namespace) -> int:
    """Print tasks' data and return the exit code.

    Raises
    ------
    ConfigError
        With every mistake of the arguments and the data.
    """
    problems = Problems()
    if args.rows < 0:
        problems.add(f"--rows {args.rows}: must not be negative")
    if args.max_seq_length is not None and args.max_seq_length < 1:
        problems.add(f"--max-seq-length {args.max_seq_length}: must be at least 1")
    tasks: Sequence[TaskConfig] = ()
    try:
        tasks = load_trainer_config(args.trainer_config).tasks
    except ConfigError as error:
        problems += error.problems
    names = [task.name for task in tasks]
    for name in args.task or ():
        if tasks and name not in names:
            problems.add(
                f"--task {name}: no such task{did_you_mean(name, names)}: there are {names}"
            )
    problems.raise_if_any()
    if args.task:
        tasks = [task for task in tasks if task.name in args.task]
    processor = TextProcessor.of_folder(lambda: tokenizer_folder(args.model))
    vocab_size = None
    try:
        vocab_size = resolve_shape(args.model).vocab_size
    except ConfigError as error:
        problems += error.problems
    datasets = []
    for task in clip_context(tasks, args.max_seq_length):
        try:
            datasets.append(load_dataset(task, processor, args.data_dir, vocab_size))
        except ConfigError as error:
            problems += error.problems.prefixed(f"task {task.name}: ")
    problems.raise_if_any()
    try:
        processor.tokenizer  # noqa: B018 (loaded now, if it was not needed so far)
    except ConfigError as error:
        log.warning("texts are shown as token ids: %s", error)
    if args.json:
        shown = zip(summary(datasets), datasets, strict=True)
        print(
            json.dumps(
                {
                    "tasks": [
                        {**entry, "examples": list(_as_json(data, processor, args.rows))}
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
        _print_task(console, data, processor, args.rows, args.full)
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
