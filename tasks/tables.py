"""Data files as rows of named fields: JSON lines, a JSON array, CSV, parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lobra.common.documents import MOST_BYTES, check_regular, parse_json, parsing, read_text
from lobra.common.errors import ConfigError, show
from lobra.tasks.fields import TOKEN_FIELDS

Fields = Mapping[str, Any]
#: Takes what is wrong with a file, its place in the file first.
Report = Callable[[str], None]

#: Suffixes of data files, in the order in which they are looked for.
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
#: Suffixes of formats that are not read, and how compressed, columnar and UTF-16 files begin.
_OTHER = frozenset(
    (
        *(".tsv", ".txt", ".arrow", ".feather", ".gz", ".zip", ".zst", ".bz2", ".xz", ".xlsx"),
        *(".pkl", ".pickle", ".pt", ".npy", ".npz", ".orc", ".avro", ".yaml", ".yml"),
    )
)
_SIGNATURES: tuple[bytes, ...] = (
    *(b"PAR1", b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"ARROW1"),
    *(b"\xff\xfe", b"\xfe\xff"),
)
#: Columns of a CSV file whose cells are JSON.
_JSON_COLUMNS = ("messages", "conversations", "conversation", "history", *TOKEN_FIELDS)


def read_table(path: Path, report: Report) -> Iterator[tuple[str, Fields]]:
    """Yield (its place, its fields) of every row of a data file; report what is no row.

    The suffix says the format: ``.parquet``; ``.csv``, whose fields are all texts; anything else
    is JSON, one object a line or one array of objects. A field that is null in parquet is not
    there, at any depth: such files have no other way to leave one out.

    Raises
    ------
    ConfigError
        If the file cannot be read as what its suffix says.
    """
    check_regular(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".csv":
        return _read_csv(path, report)
    with path.open("rb") as file:
        beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in _OTHER or beginning.startswith(_SIGNATURES):
        raise ConfigError(
            f"{path}: is no format that is read here: want {', '.join(SUFFIXES)} in UTF-8; convert "
            "it, for example by datasets.load_dataset(..., split='train').to_json('data.jsonl')"
        )
    if beginning.startswith(b"["):
        return _read_array(path, report)
    return _read_lines(path, report)


def _read_lines(path: Path, report: Report) -> Iterator[tuple[str, Fields]]:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MOST_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            place = f"line {number}"
            if len(line) > MOST_BYTES:
                raise ConfigError(
                    f"{path}: {place}: has more than {MOST_BYTES} bytes: divide it into rows"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                report(f"{place}: not UTF-8 text ({error.reason})")
            except RecursionError:
                report(f"{place}: nested too deeply")
            except json.JSONDecodeError as error:
                hint = ""
                if number == 1 and text == "{":
                    hint = (
                        "; the file looks like one JSON object over several lines: want one "
                        "object per line, or an array of objects"
                    )
                report(f"{place}, column {error.colno}: not valid JSON: {error.msg}{hint}")
            except ValueError as error:  # an integer of thousands of digits
                report(f"{place}: {error}")
            else:
                if isinstance(row, dict):
                    yield place, row
                else:
                    report(f"{place}: is {show(row)}, want an object {{...}}")


def _read_array(path: Path, report: Report) -> Iterator[tuple[str, Fields]]:
    text = read_text(path, most_bytes=None)
    with parsing(path):
        rows = parse_json(text, takes_doubled_fields=True)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield f"row {number}", row
        else:
            report(f"row {number}: is {show(row)}, want an object {{...}}")


def _read_parquet(path: Path) -> Iterator[tuple[str, Fields]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as parquet: {reason}") from None


def _read_csv(path: Path, report: Report) -> Iterator[tuple[str, Fields]]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            names = [name.strip() for name in next(rows, [])]
            _check_header(path, names)
            for number, cells in enumerate(rows, 1):
                if not cells:  # a blank line
                    continue
                place = f"row {number} (to line {rows.line_num})"
                if len(cells) != len(names):
                    report(
                        f"{place}: has {len(cells)} cells, the header {len(names)}: put a text "
                        "that holds a comma between quotes"
                    )
                    continue
                try:
                    yield place, {k: _cell(k, v) for k, v in zip(names, cells, strict=True)}
                except (ValueError, RecursionError) as error:
                    report(f"{place}: not valid JSON in a column of lists: {error}")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from None
    except (csv.Error, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as CSV: {error}") from None


def _check_header(path: Path, names: list[str]) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"{path}: the header has {', '.join(double)} more than once, keep one")
    other = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if other:
        raise ConfigError(f"{path}: its cells are separated by {other!r}, want commas")


def _cell(name: str, text: str) -> Any:
    """Return a cell; where the column holds lists, their JSON read."""
    return json.loads(text) if name in _JSON_COLUMNS and text.strip() else text


def without_nulls(value: Any) -> Any:
    """Return a value of a columnar file without the fields that are null, at every depth.

    Arrow gives every record the fields of all records, so a null may be nobody's.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
