"""What became of a task's rows: how they were read, what was cut, dropped, ignored, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lobra.tasks.config import TaskConfig

if TYPE_CHECKING:
    from lobra.tasks.dataset import TokenizedDataset
    from lobra.tasks.rows import Rows

PERCENTILES = (50, 90, 99)
NAMED_ROWS = 20


@dataclass
class DataReport:
    """Counts and remarks on the way from a task's files to its sequences.

    Attributes
    ----------
    task
        Whose data.
    files
        Of every file: its path, format, what is learned of its rows, and how many there are.
    num_spelled
        Sequences in which a text spelled a special token, and which have its characters.
    num_cut
        Sequences cut to the context length.
    dropped
        Rows left out, by reason.
    origins
        Of every sequence: the place of its row, and its tokens before it was cut.
    first_dropped
        The first of them, with their places.
    ignored
        Fields that were there and mean nothing here, with in how many rows.
    notes
        Whatever else a user should know.
    """

    task: TaskConfig
    files: list[tuple[Path, str, str, int]] = field(default_factory=list)
    num_spelled: int = 0
    num_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    origins: list[tuple[str, int]] = field(default_factory=list)
    first_dropped: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add_file(self, path: Path, rows: Rows) -> None:
        """Note how a file was read."""
        self.files.append((path, rows.kind, rows.learns, rows.num_rows))
        self.ignored.update(rows.ignored)
        self.notes += [f"{path}: {note}" for note in rows.notes]

    def drop(self, reason: str, place: str) -> None:
        """Note that a row is left out."""
        self.dropped[reason] += 1
        if len(self.first_dropped) < NAMED_ROWS:
            self.first_dropped.append(f"{place}: {reason}")

    def as_plain(self) -> dict[str, Any]:
        """Return all but the task as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["task"]
        return values | {"files": [[str(path), *rest] for path, *rest in self.files]}

    @classmethod
    def from_plain(cls, task: TaskConfig, values: Mapping[str, Any]) -> DataReport:
        """Return what `as_plain` was called on.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the values are not of a report.
        """
        return cls(
            task=task,
            files=[(Path(path), kind, learns, int(n)) for path, kind, learns, n in values["files"]],
            num_spelled=int(values["num_spelled"]),
            num_cut=int(values["num_cut"]),
            dropped=Counter(values["dropped"]),
            origins=[(place, int(length)) for place, length in values["origins"]],
            first_dropped=list(values["first_dropped"]),
            ignored=Counter(values["ignored"]),
            notes=list(values["notes"]),
        )

    @property
    def source(self) -> str:
        """The files' paths."""
        return ", ".join(str(path) for path, *_ in self.files)

    @property
    def num_rows(self) -> int:
        """Rows read, over all files."""
        return sum(count for *_, count in self.files)

    @property
    def num_dropped(self) -> int:
        """Rows left out, for whatever reason."""
        return self.dropped.total()

    def remarks(self) -> list[str]:
        """Return, a line each, what was read how and what was not used."""
        lines = [f"{path}: {kind} rows; learned: {learns}" for path, kind, learns, _ in self.files]
        if self.ignored:
            names = ", ".join(f"{name} ({count})" for name, count in self.ignored.most_common(10))
            more = len(self.ignored) - 10
            lines.append(
                f"ignored fields (in so many rows): {names}" + f", {more} more" * (more > 0)
            )
        lines += [f"{count} rows dropped: {reason}" for reason, count in self.dropped.items()]
        if self.num_cut:
            lines.append(f"{self.num_cut} sequences cut to {self.task.context_length} tokens")
        if self.num_spelled:
            lines.append(
                f"{self.num_spelled} sequences spell special tokens in their texts: there they are "
                "characters"
            )
        return lines + self.notes


def summary(datasets: Sequence[TokenizedDataset]) -> list[dict[str, Any]]:
    """Return of every task's data: rows, sequences, tokens, learned share, lengths, remarks."""
    entries = []
    for data in datasets:
        report = data.report
        if report is None:
            continue
        lengths = data.lengths
        entries.append(
            {
                "task": report.task.name,
                "rows": report.num_rows,
                "sequences": len(data),
                "tokens": len(data.tokens),
                "learned_share": data.num_labels / len(data.tokens),
                **{f"p{p}": int(np.percentile(lengths, p)) for p in PERCENTILES},
                "max": int(lengths.max()),
                "cut": report.num_cut,
                "dropped": report.num_dropped,
                "remarks": report.remarks(),
            }
        )
    return entries


def summary_text(datasets: Sequence[TokenizedDataset]) -> str:
    """Return the summary as a table with each task's remarks under it; "" without any report."""
    entries = summary(datasets)
    if not entries:
        return ""
    columns: tuple[str, ...] = ("task", "rows", "sequences", "tokens", "learned")
    columns += (*(f"p{p}" for p in PERCENTILES), "max", "cut", "dropped")
    table = [columns] + [
        tuple(
            f"{entry['learned_share']:.0%}"
            if name == "learned"
            else f"{entry[name]:,}"
            if isinstance(entry[name], int)
            else str(entry[name])
            for name in columns
        )
        for entry in entries
    ]
    widths = [max(len(row[k]) for row in table) for k in range(len(columns))]
    lines = [
        "  ".join(
            value.ljust(width) if k == 0 else value.rjust(width)
            for k, (value, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    lines += [f"{entry['task']}: {line}" for entry in entries for line in entry["remarks"]]
    return "\n".join(lines)
