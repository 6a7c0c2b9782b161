from __future__ import annotations

import pytest

from lobra.common.errors import ConfigError
from lobra.planner.candidates import Candidates, all_candidates, propose
from lobra.profiler.profiles import MemoryProfile, MemoryRow
from tests.planner.support import plain_cost_model


def published(*rows: tuple[int, int, int]) -> MemoryProfile:
    return MemoryProfile(tuple(MemoryRow(tp, pp, 1, tokens) for tp, pp, tokens in rows))


def test_candidates_say_what_was_left_out() -> None:
    cost_model = plain_cost_model()
    memory = published((1, 1, 2048), (2, 1, 4096), (8, 1, 8192), (1, 16, 4096), (4, 1, 8192))
    found = all_candidates(memory, cost_model, 8, 4096, 8)
    assert [str(c.layout) for c in found.chosen] == ["<1,1>", "<2,1>", "<4,1>"]
    text = " ".join(found.dropped)
    assert "<1,16>: needs 16 GPUs" in text
    assert "<8,1>: the time profile" in text


def test_candidates_are_what_nodes_and_the_model_take() -> None:
    cost_model = plain_cost_model()
    layers = cost_model.num_layers
    memory = published(
        (1, 1, 4096), (2, 1, 4096), (4, 1, 8192), (1, layers, 4096), (1, layers + 1, 4096)
    )

    def refused(tp: int, _pp: int) -> str | None:
        return "3 heads" if tp == 2 else None

    found = all_candidates(memory, cost_model, 6 * layers, 4096, 3, refused)
    assert [str(c.layout) for c in found.chosen] == ["<1,1>", f"<1,{layers}>"]
    assert set(found.dropped) == {
        "<2,1>: 3 heads",
        "<4,1>: tp 4 spans nodes of 3 GPUs but is no multiple of it",
        f"<1,{layers + 1}>: pp {layers + 1} is more than the {layers} layers",
    }


def test_no_layout_for_the_longest_bucket_names_the_missing_times() -> None:
    cost_model = plain_cost_model()
    memory = published((1, 1, 2048), (8, 1, 8192))
    with pytest.raises(ConfigError, match=r"longest bucket of 5008 .*no rows for tp 8"):
        all_candidates(memory, cost_model, 8, 5008, 8)
    with pytest.raises(ConfigError, match="at least one GPU"):
        all_candidates(memory, cost_model, 0, 100, 8)


def test_the_proposal_keeps_the_fastest_of_each_capacity() -> None:
    cost_model = plain_cost_model()
    memory = published((1, 1, 2048), (1, 2, 2048), (2, 1, 4096), (4, 1, 8192))
    everything = all_candidates(memory, cost_model, 8, 2048, 8)
    proposed = propose(everything, cost_model)
    assert isinstance(proposed, Candidates)
    assert [str(c.layout) for c in proposed.chosen] == ["<1,1>", "<2,1>", "<4,1>"]
    assert any(text.startswith("<1,2>: not proposed") for text in proposed.dropped)
