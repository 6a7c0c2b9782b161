"""Two nodes that train the golden adapters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.assets.golden import copy_inputs
from tests.machines.nodes import Node, two_nodes, write_script

#: Of two shards each, and of one: rank by rank, a group of two would be on both nodes.
PLAN = """strategy_config:
- {dp: 2, tp: 2, pp: 1, max_tokens: 256}
- {dp: 2, tp: 1, pp: 1, max_tokens: 128}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the golden model, tasks, data and first adapters, and a plan of six ranks."""
    copy_inputs(tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "runs").mkdir()
    write_script(
        tmp_path / "bin" / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    write_script(tmp_path / "bin" / "python", f'exec {sys.executable} "$@"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def nodes(place: Path) -> Iterator[tuple[Node, Node]]:
    with two_nodes(place, {"lobra-0": "lobra-0.lobra", "lobra-1": "lobra-1.lobra"}) as made:
        yield made
