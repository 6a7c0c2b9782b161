"""The README's table of what is supported is what the tests show."""

from __future__ import annotations

from tests.supported import README, table


def test_the_table_of_the_readme_is_current() -> None:
    assert table() in README.read_text(encoding="utf-8"), "python -m tests.supported writes it"
