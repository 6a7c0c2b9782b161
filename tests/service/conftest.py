"""One service that the tests of its package share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model.support import save_family
from tests.service.support import Running, deployment_of, running


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen3", tmp_path_factory.mktemp("service") / "base", num_hidden_layers=2)


@pytest.fixture(scope="package")
def mixed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service on replicas <1,1> and <1,2>; two of its models are on them at once."""
    folder = tmp_path_factory.mktemp("mixed")
    layouts = [(1, 1), (1, 2)]
    with running(
        deployment_of(base, folder / "state", layouts, 64, precision="fp64", max_slots=2)
    ) as found:
        yield found
