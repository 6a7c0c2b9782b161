"""Rows of sampled tokens keep what is known of each token, and are never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.dataset import TokenizedDataset, load_dataset, split
from lobra.trainer.batches import draw_sequences
from tests.tasks.support import small_tokenizer, task, write_rows

ROW: dict[str, Any] = dict(
    prompt_ids=[1, 5], completion_ids=[7, 8, 9], logprobs=[-0.5, -2.0, 0], advantages=0.7
)


def load(folder: Path, *rows: Any, **fields: Any) -> TokenizedDataset:
    write_rows(folder, *rows)
    own = task(**{"objective": "ppo", **fields})
    return load_dataset(own, small_tokenizer(folder / "tokenizer"), folder)


def test_completions_are_learned_by_their_advantages(tmp_path: Path) -> None:
    data = load(tmp_path, ROW, {**ROW, "advantages": [1, 2, 3]})
    assert data.num_labels == 6 and data.num_examples == 2
    drawn = draw_sequences(0, task(objective="ppo", global_batch_size=2, clip_low=0.5), data, 0, 0)
    for sequence in drawn:
        assert sequence.targets.tolist() == [2, 3, 4] and sequence.rollout is not None
        assert sequence.rollout.logprobs.tolist() == ROW["logprobs"]
        wanted = [[0.7] * 3, [1, 2, 3]][sequence.index]
        assert sequence.rollout.advantages.tolist() == wanted
        assert (sequence.rollout.clipping.low, sequence.rollout.clipping.high) == (0.5, 1.2)


def test_they_are_kept_and_held_out_with_their_tokens(tmp_path: Path) -> None:
    rows = [{**ROW, "advantages": float(k), "prompt_ids": [k + 1]} for k in range(9)]
    own = task(objective="ppo", validation_split=0.3)
    data = load(tmp_path, *rows, validation_split=0.3)
    for part in split(own, data, 0):
        assert part is not None
        part.save(tmp_path / "saved")
        again = TokenizedDataset.load(tmp_path / "saved")
        for index in range(len(again)):
            tokens, _ = again.sequence(index)
            sampled = again.sampled(index)
            assert sampled is not None
            assert np.array_equal(sampled[1][1:], [tokens[0] - 1] * 3)


def test_a_long_one_is_dropped_whole(tmp_path: Path) -> None:
    long = {**ROW, "prompt_ids": [1] * 30}
    data = load(tmp_path, ROW, long, context_length=16)
    assert (len(data), data.num_dropped, data.num_truncated) == (1, 1, 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt_ids": []}, "prompt_ids: is empty"),
        ({"prompt_ids": None}, "prompt_ids: is missing"),
        ({"completion_ids": [7, -1, 9]}, "completion_ids[1] = -1"),
        ({"logprobs": [-1.0, -2.0]}, "logprobs: are 2, want one for each of 3 completion_ids"),
        ({"logprobs": [-1.0, 0.5, -1.0]}, "logprobs[1] = 0.5: want at most 0"),
        ({"logprobs": -1.0}, "logprobs = -1.0: want a list of numbers"),
        ({"advantages": [1.0]}, "advantages: are 1, want one for each of 3"),
        ({"advantages": True}, "advantages[0] = true: want a finite number"),
        ({"advantages": 10**400}, "want a finite number, at most 1e+30"),
        ({"logprobs": [-1.0, float("nan"), -1e31]}, "logprobs[1] = NaN: want a finite number"),
    ],
)
def test_what_is_wrong_is_one_problem(changes: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, ROW, ROW | changes)
    (problem,) = caught.value.problems
    assert told in problem


def test_other_objectives_have_no_such_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for the objective ppo"):
        load(tmp_path, ROW, objective="supervised")
    with pytest.raises(ConfigError, match="does not go with rows of the format 'rollout'"):
        load(tmp_path, ROW, prompt="chat")


def test_rows_of_another_form_are_told_once_with_what_is_wrong_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, 7, *[{"prompt": "a", "completion": "b"}] * 100)
    before, told = caught.value.problems
    assert "line 1: is 7, want an object" in before
    assert 'objective = "ppo": the first row has no prompt_ids (did you mean' in told
    assert told.endswith("want rows of prompt_ids, completion_ids, logprobs, advantages")
