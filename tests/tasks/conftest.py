from __future__ import annotations

from typing import Any

import pytest

from tests.tasks.support import small_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
