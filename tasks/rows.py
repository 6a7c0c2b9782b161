"""The rows of a data file, read in the format its first row says (`tasks.formats`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lobra.common.errors import ConfigError, Problems
from lobra.tasks.chat import ChatError
from lobra.tasks.conversations import FieldError
from lobra.tasks.formats import format_of
from lobra.tasks.objectives import SUPERVISED
from lobra.tasks.row_format import Reading, RowFormat, SettingError
from lobra.tasks.tables import read_table
from lobra.tasks.text_rows import Row


@dataclass
class Rows:
    """What a file's rows have become.

    Attributes
    ----------
    rows, places
        The rows, and for each the place in the file of the row it comes from ("line 7").
    kind
        The format.
    learns
        What is learned, in words.
    ignored
        Fields that were there and mean nothing here, with in how many rows.
    notes
        Whatever else a user should know.
    """

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    num_rows: int = 0
    kind: str = ""
    learns: str = ""
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_rows(path: Path, reading: Reading) -> Rows:
    """Return the rows of a data file, rendered as the task wants them.

    Raises
    ------
    ConfigError
        With file, line, field and remedy of every mistake (the first twenty, and a count).
    """
    problems = Problems()
    found = Rows()
    row_format: RowFormat | None = None
    table = read_table(path, lambda problem: problems.add(f"{path}: {problem}"))
    first = ""
    for place, fields in islice(table, reading.max_rows):
        # A null column is not there: files written from tables have all columns in every row.
        fields = {name: value for name, value in fields.items() if value is not None}
        first = first or place
        try:
            if row_format is None:
                row_format = format_of(fields, reading)
                found.kind = row_format.kind
                found.learns = "everything" if reading.train_on_inputs else row_format.learns
            rows = row_format.parse(fields)
            found.rows += rows
            found.num_rows += 1
            found.places += [place] * len(rows)
            found.ignored.update(row_format.ignored(fields))
            if reading.objective == SUPERVISED and len(rows) > 1:
                row_format.num_split += 1
                row_format.num_parts += len(rows)
        except SettingError as error:  # of every row
            problems.add(f"{path}: {error}")
            break
        except (FieldError, ChatError) as error:
            hint = ""
            if "is missing" in str(error) and place != first:
                hint = f" ({first} says that the file has rows of the format {found.kind})"
            problems.add(f"{path}: {place}: {error}{hint}")
        except RecursionError:
            problems.add(f"{path}: {place}: nested too deeply")
    problems.raise_if_any()
    if row_format is None:
        raise ConfigError(f"{path}: has no rows")
    found.notes += row_format.notes()
    return found
