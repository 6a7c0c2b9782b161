"""Data files as rows of named fields: JSON lines, a JSON array, CSV, parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lobra.common.checks import show
from lobra.common.errors import ConfigError

Fields = Mapping[str, Any]
#: Takes what is wrong with a file, its place in the file first.
Report = Callable[[str], None]

#: Suffixes of data files, in the order in which they are looked for.
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_table(path: Path, report: Report) -> Iterator[tuple[str, Fields]]:
    """Yield (its place, its fields) of every row of a data file; report what is no row.

    The suffix says the format: ``.parquet``; ``.csv``, whose fields are all texts; anything else
    is JSON, one object a line or one array of objects. A field that is null in parquet is not
    there: such files have no other way to leave one out.

    Raises
    ------
    ConfigError
        If the file cannot be read as what its suffix says.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if _first_character(path) == b"[":
        return _read_array(path, report)
    return _read_lines(path, report)


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_lines(path: Path, report: Report) -> Iterator[tuple[str, Fields]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"line {number}"
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
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
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


def _read_csv(path: Path) -> Iterator[tuple[str, Fields]]:
    import pandas as pd

    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
        )
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except (ValueError, OSError) as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as CSV: {reason}") from None
    names = [str(name) for name in table.columns]
    for number, values in enumerate(table.itertuples(index=False, name=None), 1):
        yield f"row {number}", dict(zip(names, values, strict=True))


def without_nulls(value: Any) -> Any:
    """Return a value of a columnar file without the fields that are null, at every depth.

    Arrow gives every record the fields of all records, so a null may be nobody's.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
