"""A tenant's program for a node: it trains, and says when; what it has got is its last line."""

from __future__ import annotations

import json
import sys

from tests.service.support import Client
from tests.service.test_equality import Trainer, steps_of

TENANT = 0  # of the shared ones


def main(port: int, key: str) -> None:
    """Train a step, wait for a line, train on, and once more from a checkpoint in between."""
    trainer = Trainer(Client(port, key), TENANT)
    start = trainer.save("save_weights_for_sampler", "start")
    steps = steps_of(TENANT)
    trainer.train(steps[:1])
    middle = trainer.save("save_weights", "middle")
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    sys.stdin.readline()
    trainer.train(steps[1:])
    ends = [trainer.save("save_weights_for_sampler", "end")]
    load = dict(session_id=trainer.session, model_seq_id=1, path=middle, optimizer=True)
    again = Trainer(trainer.client, TENANT)
    loaded = again.client.asked("load_weights", **load)
    again.model = again.client.result(loaded)["model_id"]
    again.train(steps[1:])
    ends.append(again.save("save_weights_for_sampler", "end"))
    logprobs = [own.tolist() for own in trainer.logprobs]
    sys.stdout.write(json.dumps({"start": start, "ends": ends, "logprobs": logprobs}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
