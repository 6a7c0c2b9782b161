"""Lines stay within their drawing, in order, with gaps where there is nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from lobra.service.charts import bar, lines

values = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=20)


@given(values, values, st.floats(-10, 10))
def test_every_value_is_drawn_within_the_drawing(
    one: list[float | None], other: list[float | None], low: float
) -> None:
    drawing = lines({"measured": one, "predicted": other}, "a < b", width=100, height=40, low=low)
    root = ElementTree.fromstring(drawing)
    drawn: dict[str, list[tuple[float, float]]] = {"measured": [], "predicted": []}
    for line in root:
        corners = [tuple(map(float, text.split(","))) for text in line.attrib["points"].split()]
        drawn[line.attrib["class"]] += corners  # type: ignore[arg-type]
    for name, own in (("measured", one), ("predicted", other)):
        known = [value for value in own if value is not None]
        assert len(drawn[name]) == len(known)
        assert all(0 <= x <= 100 and 0 <= y <= 40 for x, y in drawn[name])
        assert [x for x, _ in drawn[name]] == sorted(x for x, _ in drawn[name])
        order = sorted(range(len(known)), key=known.__getitem__)
        heights = [drawn[name][place][1] for place in order]
        assert all(below >= above for below, above in zip(heights, heights[1:], strict=False))


@given(st.floats(-5, 5))
def test_a_bar_is_never_fuller_than_full(share: float) -> None:
    found = re.search(r"width:([\d.]+)%", bar(share, "a"))
    assert found is not None and 0 <= float(found[1]) <= 100
