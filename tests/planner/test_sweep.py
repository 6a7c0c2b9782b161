from __future__ import annotations

import pytest

from lobra.common.errors import ConfigError
from lobra.planner.sweep import parse_range


@pytest.mark.parametrize("text", ["8", "8-64", "64:8", "0:8", "8:64:0", "a:b"])
def test_a_sweep_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep-gpus"):
        parse_range(text)


def test_a_sweep_has_about_fifteen_points() -> None:
    assert parse_range("8:64:8") == list(range(8, 65, 8))
    assert parse_range("4:10") == list(range(4, 11))
    assert len(parse_range("8:1024")) <= 15
