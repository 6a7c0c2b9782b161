"""A task's data set, tokenised: flat arrays of token ids and labels, with offsets."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.chat import chat_renderer
from tasks.config import TaskConfig
from tasks.encoding import MASKED, cut, encode_rows
from tasks.errors import ConfigError
from tasks.files import atomic_path, write_atomic
from tasks.rows import read_rows
from tasks.sources import resolve_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["MASKED", "TokenizedDataset", "load_dataset", "resolve_dataset"]

logger = logging.getLogger(__name__)

_ARRAYS = {"tokens": np.int32, "labels": np.int32, "offsets": np.int64}


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
    num_truncated
        Sequences that were cut to the context length.
    num_dropped
        Rows left out because nothing was there to learn, or nothing was left of it.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    num_truncated: int = 0
    num_dropped: int = 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sequence, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def num_labels(self) -> int:
        """Tokens that carry a loss, over all sequences."""
        return int(np.count_nonzero(self.labels != MASKED))

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
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.labels[part]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the arrays as .npy files and the counts as JSON into a folder."""
        folder = Path(folder)
        for name in _ARRAYS:
            with atomic_path(folder / f"{name}.npy") as temporary:
                np.save(temporary, getattr(self, name), allow_pickle=False)
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
        try:
            for name, dtype in _ARRAYS.items():
                path = folder / f"{name}.npy"
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
                if arrays[name].ndim != 1 or arrays[name].dtype != dtype:
                    raise ConfigError(f"{path}: want {np.dtype(dtype)} of one axis")
            counts = json.loads((folder / "counts.json").read_text())
            data = cls(
                tokens=arrays["tokens"],
                labels=arrays["labels"],
                offsets=arrays["offsets"],
                num_truncated=int(counts["num_truncated"]),
                num_dropped=int(counts["num_dropped"]),
            )
        except ConfigError:
            raise
        except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{folder}: no saved data set ({error}): tokenise it again"
            ) from error
        size = len(data.tokens)
        good = len(data.offsets) and data.offsets[0] == 0 and data.offsets[-1] == size
        if not good or len(data.labels) != size or np.any(data.lengths < 0):
            raise ConfigError(f"{folder}: its arrays do not belong together: tokenise it again")
        return data


def load_dataset(
    task: TaskConfig, tokenizer: PreTrainedTokenizerFast, data_dir: str | os.PathLike[str]
) -> TokenizedDataset:
    """Return a task's data set, tokenised, its prompts masked, cut to its context length.

    The order is the file's. Rows without anything to learn are dropped and counted, longer
    sequences cut and counted; both are logged.

    Raises
    ------
    ConfigError
        If the file is missing, has mistakes (all are named), or nothing in it can be learned.
    """
    path = resolve_dataset(task.dataset_name, Path(data_dir))
    rows = read_rows(
        path,
        prompt=task.prompt,
        json_key=task.json_key,
        vocab_size=len(tokenizer),
        render_chat=chat_renderer(tokenizer),
    )
    sequences, masks = [], []
    num_truncated = num_dropped = 0
    for tokens, learned in encode_rows(rows, tokenizer):
        too_long = len(tokens) > task.context_length
        if too_long:
            tokens, learned = cut(tokens, learned, task.context_length)
        learned[:1] = False
        if not learned.any():
            num_dropped += 1
            continue
        num_truncated += too_long
        sequences.append(tokens)
        masks.append(learned if not task.train_on_inputs else np.arange(len(tokens)) > 0)
    if not sequences:
        raise ConfigError(
            f"{path}: none of its {len(rows)} rows has anything to learn within "
            f"context_length = {task.context_length}: want rows with an output, "
            "or a longer context"
        )
    if num_truncated or num_dropped:
        logger.info(
            "task %s: %d of %d sequences cut to %d tokens, %d rows without target left out",
            task.name,
            num_truncated,
            len(sequences),
            task.context_length,
            num_dropped,
        )
    all_tokens = np.concatenate(sequences)
    return TokenizedDataset(
        tokens=all_tokens,
        labels=np.where(np.concatenate(masks), all_tokens, np.int32(MASKED)),
        offsets=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        num_truncated=num_truncated,
        num_dropped=num_dropped,
    )
