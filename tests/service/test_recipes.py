"""Tinker's client and the recipes of its cookbook train here, as they are."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.service.recipes import MODEL, Server, lines, make_folders, tinker_python, wait_for

pytestmark = [pytest.mark.long, pytest.mark.ranks]

STEPS = 12  # of 96 conversations in batches of 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tinker_python()
    root = tmp_path_factory.mktemp("recipes")
    make_folders(root)
    server = Server.of(root)
    server.start()
    yield server
    assert server.stop() == 143


def losses(path: Path) -> dict[int, float]:
    return {line["step"]: line["train_mean_nll"] for line in lines(path)}


@pytest.mark.parametrize("kills", [0, 3])
def test_sl_loop_trains_whatever_happens_to_the_server(server: Server, kills: int) -> None:
    """It is killed in the middle and started again, and the recipe does not notice."""
    log = server.root / f"sl{kills}"
    options = dict(batch_size=8, learning_rate=0.02, lora_rank=8, save_every=5)
    recipe = server.recipe("sl_loop", str(log), **options)
    for kill in range(kills):
        wait_for(1 + 3 * kill, log / "metrics.jsonl", recipe)
        server.kill()
        server.start()
    output = recipe.communicate()[0]
    assert recipe.returncode == 0, output
    found = losses(log / "metrics.jsonl")
    assert list(found) == list(range(STEPS))
    assert np.mean([found[step] for step in range(STEPS - 3, STEPS)]) < 0.9 * found[0]
    path = lines(log / "checkpoints.jsonl")[-1]["sampler_path"]
    server.adapter(path, log)
    base = AutoModelForCausalLM.from_pretrained(server.root / MODEL)
    model = PeftModel.from_pretrained(base, log / "final")
    assert model.peft_config["default"].r == 8


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("sl_loop", {}),
        (
            "chat_sl.train",
            dict(
                eval_every=0, max_length=512, rolling_save_every=1,
                behavior_if_log_dir_exists="resume",
            ),
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_is_killed_goes_on(server: Server, module: str, extra: dict) -> None:
    log = server.root / module
    options = dict(batch_size=8, learning_rate=0.02, lora_rank=4, save_every=2, **extra)
    recipe = server.recipe(module, str(log), **options)
    wait_for(5, log / "metrics.jsonl", recipe)
    recipe.kill()
    recipe.wait()
    saved = [entry["batch"] for entry in lines(log / "checkpoints.jsonl")]
    before = losses(log / "metrics.jsonl")
    again = server.recipe(module, str(log), **options)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    after = losses(log / "metrics.jsonl")
    assert 0 < min(saved) <= max(saved) < STEPS
    assert set(after) == set(range(STEPS))
    assert np.mean([after[step] for step in range(STEPS - 3, STEPS)]) < 0.9 * before[0]
    if module == "sl_loop":  # the other saves a later state than it says, by a step it sent ahead
        # What was trained twice, before and after, had the same start and the same data.
        for step in set(before) & set(after):
            assert after[step] == pytest.approx(before[step], rel=1e-5)


def test_rl_loop_is_rewarded_more(server: Server) -> None:
    log = server.root / "rl"
    options = dict(batch_size=8, group_size=8, learning_rate=0.001, lora_rank=4, max_tokens=12)
    recipe = server.recipe("rl_loop", str(log), max_steps=8, save_every=0, **options)
    output = recipe.communicate()[0]
    assert recipe.returncode == 0, output
    rewards = [line["reward/total"] for line in lines(log / "metrics.jsonl")]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1, rewards


def test_the_client_has_its_custom_losses(server: Server) -> None:
    """`forward_backward_custom` sends signed weights: it does what plain ones do."""
    program = textwrap.dedent(
        f"""
        import json, tinker
        from tinker import types
        service = tinker.ServiceClient()
        def datum(weight):
            inputs = {{"target_tokens": [6, 7, 8], "weights": [0.0, weight, -weight]}}
            return types.Datum(
                model_input=types.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs=inputs
            )
        def loss(data, logprobs):
            return -2.0 * (logprobs[0][1] - logprobs[0][2]), {{"pairs": 1.0}}
        found = []
        for custom in (False, True):
            client = service.create_lora_training_client({MODEL!r}, rank=4, seed=5).result()
            for _ in range(3):
                if custom:
                    client.forward_backward_custom([datum(1.0)], loss).result()
                else:
                    client.forward_backward([datum(2.0)], "cross_entropy").result()
                client.optim_step(types.AdamParams(learning_rate=0.01, grad_clip_norm=1.0)).result()
            found.append(client.forward([datum(1.0)], "cross_entropy").result())
        print(json.dumps([one.loss_fn_outputs[0]["logprobs"].tolist() for one in found]))
        """
    )
    done = server.python("-W", "ignore", "-c", program)
    output = done.communicate()[0]
    assert done.returncode == 0, output
    plain, custom = json.loads(output.splitlines()[-1])
    assert plain == pytest.approx(custom, abs=1e-5)
