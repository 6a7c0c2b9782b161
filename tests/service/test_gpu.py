"""The service on a GPU: the same proofs as on CPU ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import test_sampling
from tests.service.support import Running, deployment_of, running
from tests.service.test_equality import STEPS, Trainer, check, steps_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def on_gpu(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service whose only rank shares the GPU with what draws samples."""
    options = dict(precision="fp64", device="cuda", memory_budget="8GiB")
    state = tmp_path_factory.mktemp("gpu") / "state"
    with running(deployment_of(base, state, [(1, 1)], 128, **options)) as found:
        yield found


def test_samples_are_peft_s(on_gpu: Running, tmp_path: Path) -> None:
    test_sampling.test_samples_of_several_tenants_are_peft_s(on_gpu, tmp_path)


def test_tenants_get_what_they_would_get_alone(on_gpu: Running, tmp_path: Path) -> None:
    trainers = [Trainer(on_gpu.client(f"training{number}"), number) for number in range(2)]
    starts = [trainer.save("save_weights", "start") for trainer in trainers]
    for number in range(STEPS):  # both tenants' requests wait together
        sent = [trainer.send(steps_of(trainer.number)[number]) for trainer in trainers]
        for trainer, futures in zip(trainers, sent, strict=True):
            trainer.receive(futures)
    for trainer, start in zip(trainers, starts, strict=True):
        check(on_gpu, trainer, start, trainer.save("save_weights", "end"), tmp_path)
