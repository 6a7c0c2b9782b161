"""Work adds up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.sequences import Work, total_work

count = st.integers(0, 2**40)
works = st.builds(Work, count, count, count)


@given(st.lists(works))
def test_work_adds(parts: list[Work]) -> None:
    whole = total_work(parts)
    assert whole == total_work(reversed(parts))
    for name in ("tokens", "squares", "labels"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
