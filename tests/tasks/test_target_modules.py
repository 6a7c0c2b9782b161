from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.tasks.target_modules import ADAPTED_MODULES, MODULE_ALIASES, resolve_target_modules


@given(st.lists(st.sampled_from([*ADAPTED_MODULES, *MODULE_ALIASES]), min_size=1))
def test_target_modules_are_each_once_and_in_order(names: list[str]) -> None:
    modules = resolve_target_modules(names)
    expected = {m for name in names for m in MODULE_ALIASES.get(name, (name,))}
    assert set(modules) == expected and len(modules) == len(expected)
    assert list(modules) == sorted(modules, key=ADAPTED_MODULES.index)
    assert resolve_target_modules(names[::-1]) == modules


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="rotary_emb"):
        resolve_target_modules(["rotary_emb"])
