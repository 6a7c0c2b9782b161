"""A task's data set, tokenised: flat arrays of token ids and labels, with offsets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lobra.common.errors import ConfigError, Problems
from lobra.common.files import atomic_path, write_atomic
from lobra.tasks.cache import digest_of, read_entry, write_entry
from lobra.tasks.config import TaskConfig
from lobra.tasks.data_report import DataReport
from lobra.tasks.encoding import LONG_TEXT, FloatArray, cut
from lobra.tasks.examples import Answer, examples
from lobra.tasks.objectives import COMPARING, PPO, SEQUENCES_OF_EXAMPLE
from lobra.tasks.row_format import Reading
from lobra.tasks.rows import Rows, read_rows
from lobra.tasks.sampling import split_sequences
from lobra.tasks.sources import resolve_dataset
from lobra.tasks.text_processor import TextProcessor
from lobra.tasks.text_rows import MASKED, Row, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["MASKED", "TokenizedDataset", "load_dataset", "resolve_dataset", "split"]

#: A task's fields that decide how its rows become tokens.
_SETTINGS = (
    *("prompt", "json_key", "train_on_inputs", "context_length", "max_samples"),
    "objective",
)
#: Texts and characters per call: a tokenizer's results take some 200 bytes a character.
_BATCH, _BATCH_CHARACTERS = 2048, 1 << 20
#: Of a text. All of one is tokenised: where it is cut follows from the lengths of all of it.
#: One that cannot be divided takes 200 bytes a character; a context holds few characters a token.
_MOST_CHARACTERS, _MOST_UNDIVIDED, _CHARACTERS_PER_TOKEN = 1 << 26, LONG_TEXT, 64
_ARRAYS = {"tokens": np.int32, "labels": np.int32, "offsets": np.int64}
#: Of examples of several sequences, and of sampled tokens, alone.
_OPTIONAL_ARRAYS = {"signs": np.int8, "logprobs": np.float64, "advantages": np.float64}


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Sequences of token ids laid end to end.

    Attributes
    ----------
    tokens
        int32 [sum of lengths].
    labels
        int32 [sum of lengths]: ``labels[k]`` is ``tokens[k]`` where it is learned, else -100. The
        shift by one happens in the loss. A sequence's first label is always -100, since nothing
        precedes it: so labels that are not -100 are exactly the tokens the loss is over.
    offsets
        int64 [n + 1]: sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.
    signs
        int8 [n]: of answers 1 if it is wanted, -1 if not, 0 if it is only compared with. Two
        sequences, 2 k and 2 k + 1, make an example. None: each sequence is an example of its own.
    logprobs, advantages
        float64 [sum of lengths]: of tokens that were sampled, where they are learned; else None.
    num_truncated
        Sequences that were cut to the context length.
    num_dropped
        Rows left out because nothing was there to learn, or nothing was left of it.
    report
        What became of the rows; None for data loaded from a folder.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    num_truncated: int = 0
    num_dropped: int = 0
    report: DataReport | None = None
    signs: NDArray[np.int8] | None = None
    logprobs: FloatArray | None = None
    advantages: FloatArray | None = None

    @property
    def sequences_of_example(self) -> int:
        """How many sequences, one after another, are drawn and computed together."""
        return 1 if self.signs is None else SEQUENCES_OF_EXAMPLE

    @property
    def num_examples(self) -> int:
        """What is drawn: sequences, or examples of several."""
        return len(self) // self.sequences_of_example

    @property
    def example_lengths(self) -> NDArray[np.int64]:
        """Tokens of every example, int64 [num_examples]."""
        return self.lengths.reshape(-1, self.sequences_of_example).sum(axis=1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sequence, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def num_labels(self) -> int:
        """Tokens that carry a loss, over all sequences."""
        return int(np.count_nonzero(self.labels != MASKED))

    def rows(self) -> NDArray[np.int64]:
        """Return the row of every sequence, counted from 0, int64 [n]; each its own if unknown."""
        if self.report is None:
            return np.arange(len(self)) // self.sequences_of_example
        places = [place for place, _ in self.report.origins]
        return np.cumsum([0, *(a != b for a, b in pairwise(places))], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    def sequence(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return (tokens, labels) of one sequence, views of int32 [length].

        Raises
        ------
        IndexError
            If there is no such sequence; negative indices are none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        part = self._part(index)
        return self.tokens[part], self.labels[part]

    def sampled(self, index: int) -> tuple[FloatArray, FloatArray] | None:
        """Return (logprobs, advantages) of one sequence, views of float64 [length], if it has any.

        They are those of its learned tokens, elsewhere 0.
        """
        if self.logprobs is None or self.advantages is None:
            return None
        part = self._part(index)
        return self.logprobs[part], self.advantages[part]

    def _part(self, index: int) -> slice:
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the arrays as .npy files and the counts as JSON into a folder."""
        folder = Path(folder)
        for name in (*_ARRAYS, *_OPTIONAL_ARRAYS):
            if (array := getattr(self, name)) is not None:
                with atomic_path(folder / f"{name}.npy") as temporary:
                    np.save(temporary, array, allow_pickle=False)
        counts = {"num_truncated": self.num_truncated, "num_dropped": self.num_dropped}
        write_atomic(folder / "counts.json", json.dumps(counts) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TokenizedDataset:
        """Return a saved data set, its arrays mapped from disk, read-only.

        Raises
        ------
        ConfigError
            If a file is missing, damaged, or the arrays do not belong together.
        """
        folder = Path(folder)
        arrays = {}
        optional = {
            name: kind
            for name, kind in _OPTIONAL_ARRAYS.items()
            if (folder / f"{name}.npy").exists()
        }
        kinds = {**_ARRAYS, **optional}
        try:
            for name, dtype in kinds.items():
                path = folder / f"{name}.npy"
                arrays[name] = np.lib.format.open_memmap(path, mode="r")
                if arrays[name].ndim != 1 or arrays[name].dtype != dtype:
                    raise ConfigError(f"{path}: want {np.dtype(dtype)} of one axis")
            counts = json.loads((folder / "counts.json").read_text())
            data = cls(
                tokens=arrays["tokens"],
                labels=arrays["labels"],
                offsets=arrays["offsets"],
                num_truncated=int(counts["num_truncated"]),
                num_dropped=int(counts["num_dropped"]),
                signs=arrays.get("signs"),
                logprobs=arrays.get("logprobs"),
                advantages=arrays.get("advantages"),
            )
        except ConfigError:
            raise
        except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{folder}: no saved data set ({error}): tokenise it again"
            ) from error
        size = len(data.tokens)
        good = len(data.offsets) and data.offsets[0] == 0 and data.offsets[-1] == size
        if data.signs is not None:
            good = good and len(data.signs) == len(data) and len(data) % SEQUENCES_OF_EXAMPLE == 0
        per_token = (data.labels, data.logprobs, data.advantages)
        good = good and all(own is None or len(own) == size for own in per_token)
        if not good or np.any(data.lengths < 0):
            raise ConfigError(f"{folder}: its arrays do not belong together: tokenise it again")
        return data


def load_dataset(
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerFast | TextProcessor,
    data_dir: str | os.PathLike[str],
    vocab_size: int | None = None,
    confine: Path | None = None,
) -> TokenizedDataset:
    """Return a task's data set, tokenised, its prompts masked, cut to its context length.

    The order is that of the files. Rows without anything to learn are dropped, longer sequences
    cut; the data set's ``report`` says how many, and what of the rows was not used.

    Parameters
    ----------
    task
        Whose data.
    tokenizer
        The model's; a `TextProcessor` loads it only if a row is a text.
    data_dir
        Where data sets lie.
    vocab_size
        Ids of tokenised rows must be below it; None: not checked.
    confine
        The folder that its files must lie in; None: anywhere.

    Raises
    ------
    ConfigError
        If a file is missing, has mistakes (all are named), or nothing in it can be learned.
    """
    processor = TextProcessor.of(tokenizer)
    files = _files(task, Path(data_dir), confine)
    entry = None
    if processor.digest is not None:
        made_from = {
            "task": {name: getattr(task, name) for name in _SETTINGS},
            "files": [str(path) for path in files],
            "tokenizer": processor.digest,
            "vocab_size": vocab_size,
        }
        entry = digest_of(files, made_from)
        found = read_entry(entry, task)
        if found is not None:
            return found
    data = _tokenised(task, processor, files, vocab_size)
    if entry is not None:
        write_entry(entry, data)
    return data


def at_field(task: TaskConfig, problem: str) -> str:
    """Return a problem of a task's data with the field of the configuration it is about."""
    is_told = problem.startswith("dataset_name = ")
    return problem if is_told else f"{named_data(task)}: {problem}"


def named_data(task: TaskConfig) -> str:
    """Return the task's data sets as its configuration has them."""
    names = task.dataset_names
    return f"dataset_name = {names[0] if len(names) == 1 else list(names)!r}"


def _files(task: TaskConfig, data_dir: Path, confine: Path | None) -> list[Path]:
    """Return the files of a task's data sets; mine or fetch what must be."""
    problems = Problems()
    files = []
    for name in task.dataset_names:
        with problems.noted():
            files.append(resolve_dataset(name, data_dir, confine))
    problems.raise_if_any()
    return files


def _tokenised(
    task: TaskConfig, processor: TextProcessor, files: Sequence[Path], vocab_size: int | None
) -> TokenizedDataset:
    """Return the data of some files, tokenised."""
    report = DataReport(task)
    encoded = _encoded(task, processor, files, report, vocab_size)
    has_examples = task.objective in COMPARING
    found = [*(examples if has_examples else _fitted)(task, encoded, report)]
    if not found:
        raise ConfigError(
            f"{report.source}: none of its {report.num_rows} rows has anything to learn within "
            f"context_length = {task.context_length}: want rows with an output, "
            "or a longer context"
        )
    all_tokens = np.concatenate([one.tokens for one in found])
    learned = np.concatenate([one.learned for one in found])
    sampled = [one.sampled for one in found if one.sampled is not None]
    logprobs, advantages = np.concatenate(sampled, axis=1) if sampled else (None, None)
    return TokenizedDataset(
        tokens=all_tokens,
        labels=np.where(learned, all_tokens, np.int32(MASKED)),
        offsets=np.cumsum([0, *(len(one.tokens) for one in found)], dtype=np.int64),
        num_truncated=report.num_cut,
        num_dropped=report.num_dropped,
        report=report,
        signs=np.array([one.sign for one in found], dtype=np.int8) if has_examples else None,
        logprobs=logprobs,
        advantages=advantages,
    )


def split(
    task: TaskConfig, data: TokenizedDataset, run_seed: int
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Return the sequences to train on, and those that ``validation_split`` holds out."""
    training, held_out = split_sequences(task, data.rows(), run_seed)
    if not len(held_out):
        return data, None
    return _select(data, training), _select(data, held_out)


def _select(data: TokenizedDataset, indices: NDArray[np.int64]) -> TokenizedDataset:
    parts = [data.sequence(int(index)) for index in indices]
    sampled = [own for index in indices if (own := data.sampled(int(index))) is not None]
    logprobs, advantages = np.concatenate(sampled, axis=1) if sampled else (None, None)
    return TokenizedDataset(
        np.concatenate([tokens for tokens, _ in parts]),
        np.concatenate([labels for _, labels in parts]),
        np.concatenate([[0], np.cumsum(data.lengths[indices])]).astype(np.int64),
        data.num_truncated,
        data.num_dropped,
        signs=None if data.signs is None else data.signs[indices],
        logprobs=logprobs,
        advantages=advantages,
    )


def _encoded(
    task: TaskConfig,
    processor: TextProcessor,
    files: Sequence[Path],
    report: DataReport,
    vocab_size: int | None,
) -> Iterator[Answer]:
    """Yield a task's rows in order, tokenised; ``report`` is filled."""
    reading = Reading(
        prompt=task.prompt,
        json_key=task.json_key,
        train_on_inputs=task.train_on_inputs,
        max_rows=task.max_samples,
        vocab_size=vocab_size,
        specials=lambda: processor.specials,
        chat=lambda: processor.chat,
        objective=task.objective,
    )
    problems = Problems()
    read = []
    for path in files:
        with problems.noted():
            read.append((path, read_rows(path, reading)))
    for path, rows in read:
        problems += _endless(path, rows, task.context_length, processor)
    problems.raise_if_any()
    for path, rows in read:
        report.add_file(path, rows)
        for start, end in _batches(rows.rows):
            batch = rows.rows[start:end]
            texts = [row for row in batch if isinstance(row, TextRow)]
            encoded = iter(processor.encoder.encode(texts) if texts else ())
            for place, row in zip(rows.places[start:], batch, strict=False):
                where = f"{path}: {place}"
                if isinstance(row, TextRow):
                    tokens, learned, is_spelled = next(encoded)
                    report.num_spelled += is_spelled
                    yield Answer(where, tokens, learned, row.sign)
                    continue
                tokens = np.array(row.tokens, dtype=np.int32)
                learned = np.array(row.labels, dtype=np.int32) != MASKED
                sampled = None
                if row.logprobs is not None:
                    sampled = np.array([row.logprobs, row.advantages], dtype=np.float64)
                yield Answer(where, tokens, learned, 0, sampled)


def _batches(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Yield where batches of rows begin and end, each of bounded size unless it is one row."""
    start = characters = 0
    for end, row in enumerate(rows):
        own = len(row.text) if isinstance(row, TextRow) else 0
        if end - start == _BATCH or (end > start and characters + own > _BATCH_CHARACTERS):
            yield start, end
            start, characters = end, 0
        characters += own
    if start < len(rows):
        yield start, len(rows)


def _endless(
    path: Path, rows: Rows, context_length: int, processor: TextProcessor
) -> Iterator[str]:
    """Yield a problem for every text that is too long to be tokenised for this context."""
    undivided = max(_MOST_UNDIVIDED, _CHARACTERS_PER_TOKEN * context_length)
    for place, row in zip(rows.places, rows.rows, strict=True):
        if not isinstance(row, TextRow) or len(row.text) <= undivided:
            continue
        most = _MOST_CHARACTERS if processor.encoder.divides(row) else undivided
        if len(row.text) > most:
            yield (
                f"{path}: {place}: its text has {len(row.text)} characters, want at most {most} "
                f"with context_length {context_length}: cut it, or divide it into rows"
            )


def _fitted(task: TaskConfig, rows: Iterable[Answer], report: DataReport) -> Iterator[Answer]:
    """Yield rows cut to the task's context; those of which nothing is learned are counted only.

    The first token is never learned: nothing precedes it. What was sampled is not cut: it would
    follow another prompt, or not be all that the advantage is of.
    """
    for row in rows:
        place, tokens, learned = row.place, row.tokens, row.learned
        length = len(tokens)
        if not learned[1:].any():
            report.drop("nothing to learn", place)
            continue
        if length > task.context_length:
            if task.objective == PPO:
                report.drop("what was sampled and its prompt are longer than the context", place)
                continue
            tokens, learned = cut(tokens, learned, task.context_length)
        learned[:1] = False
        if not learned.any():
            report.drop("nothing to learn is left within the context length", place)
            continue
        report.num_cut += len(tokens) < length
        report.origins.append((place, length))
        if task.train_on_inputs:
            learned = np.arange(len(tokens)) > 0
        yield row._replace(tokens=tokens, learned=learned)
