"""Samples are those of PEFT's model with the same adapter, and can be learned from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lobra.service.wire import CONTENT_TYPE, MESSAGES, Datum
from tests.service.support import Client, Running, logprobs_of, loss_request
from tests.service.test_equality import ADAM, BAR, VOCAB, folder_of
from tests.trainer.alone import lift_to_double

pytestmark = pytest.mark.ranks

LENGTHS = (3, 9, 14)
MAX_TOKENS = 6
FLOAT32_BAR = 1e-5  # what is sent, and transformers' own norms, are in it


def trained_model(client: Client, session: str, number: int) -> str:
    """Return a model that has learned something."""
    model = client.new_model(session, number, rank=4, seed=number)
    tokens = np.random.default_rng(number).integers(3, VOCAB, 20).astype(np.int32)
    data = [Datum(tokens[:-1], tokens[1:], np.ones(19))]
    client.losses(model, 1, data)
    adam = {**ADAM, "learning_rate": 0.02}
    client.result(client.asked("optim_step", model_id=model, seq_id=2, adam_params=adam))
    return model


def sampled(client: Client, sampler: str, seq_id: int, prompt: list[int], **fields: Any) -> Any:
    """Return the sequences that a request gets, and its logprobs of the prompt."""
    params = {"max_tokens": MAX_TOKENS, "temperature": 0.0, **fields.pop("params", {})}
    future = client.asked(
        "asample",
        sampling_session_id=sampler,
        seq_id=seq_id,
        prompt={"chunks": [{"type": "encoded_text", "tokens": prompt}]},
        sampling_params=params,
        **fields,
    )
    message: Any = MESSAGES["SampleResponse"]()
    message.ParseFromString(client.result(future))
    assert len(message.sequences) == len(future["sample_sequence_ids"])
    sequences = [
        (np.frombuffer(one.tokens, np.int32).tolist(), np.frombuffer(one.logprobs, np.float32))
        for one in message.sequences
    ]
    return sequences, np.frombuffer(message.prompt_logprobs, np.float32)


def test_samples_of_several_tenants_are_peft_s(mixed: Running, tmp_path: Path) -> None:
    """Greedy ones, of prompts of different lengths and different adapters in one batch."""

    def sample(number: int) -> tuple[str, list[int], Any]:
        client = mixed.client(f"sampling{number}")
        session = client.new_session()
        model = trained_model(client, session, number)
        save = dict(model_id=model, seq_id=3, sampling_session_seq_id=5)
        saved = client.result(client.asked("save_weights_for_sampler", **save))
        sampler = saved["sampling_session_id"]
        path = client.send("GET", f"samplers/{sampler}")[1]["model_path"]
        generator = np.random.default_rng(number)
        prompt = generator.integers(3, VOCAB, LENGTHS[number]).tolist()
        return path, prompt, sampled(client, sampler, 0, prompt, prompt_logprobs=True)

    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        results = list(pool.map(sample, range(len(LENGTHS))))
    base = mixed.service.deployment.run.model_folder
    for path, prompt, (sequences, prompt_logprobs) in results:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        model = PeftModel.from_pretrained(plain, folder_of(mixed, path))
        model.generation_config.eos_token_id = None
        tokens = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        ((found, logprobs),) = sequences
        assert found == tokens[0, len(prompt) :].tolist()
        with torch.no_grad():
            every = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        expected = every.gather(-1, tokens[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(logprobs, expected[-MAX_TOKENS:], atol=FLOAT32_BAR)
        assert np.isnan(prompt_logprobs[0])
        own = expected[: len(prompt) - 1]
        np.testing.assert_allclose(prompt_logprobs[1:], own, atol=FLOAT32_BAR)


def test_what_is_drawn_follows_the_seed_and_the_distribution(mixed: Running) -> None:
    client = mixed.client("drawing")
    session = client.new_session()
    make = dict(session_id=session, sampling_session_seq_id=0, base_model="base")
    sampler = client.asked("create_sampling_session", **make)["sampling_session_id"]
    prompt = [5, 6, 7]

    def draw(seq_id: int, num_samples: int = 1, **params: Any) -> list[list[int]]:
        fields = dict(num_samples=num_samples, params={"seed": 3, **params})
        return [tokens for tokens, _ in sampled(client, sampler, seq_id, prompt, **fields)[0]]

    (greedy,) = draw(0)
    several = draw(1, 4, temperature=1.0)
    assert draw(2, 4, temperature=1.0) == several
    assert draw(1, 4, temperature=9.0) == several  # the same number: the same request
    assert len(set(map(tuple, several))) > 1
    assert draw(3, 2, temperature=1.0, top_k=1) == [greedy, greedy]
    assert draw(4, 2, temperature=1.0, top_p=1e-9) == [greedy, greedy]
    assert draw(5, stop=[greedy[2]]) == [greedy[: greedy.index(greedy[2]) + 1]]
    ones = [tokens[0] for tokens in draw(6, 500, temperature=1.0, max_tokens=1)]
    plain = AutoModelForCausalLM.from_pretrained(mixed.service.deployment.run.model_folder)
    with torch.no_grad():
        likely = plain(torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
    counts = np.bincount(ones, minlength=VOCAB)
    top = np.argsort(-likely)[:20]
    spread = np.sqrt(500 * likely[top] * (1 - likely[top]))
    assert (np.abs(counts[top] - 500 * likely[top]) < 5 * spread + 1).all()


def test_a_policy_is_trained_as_peft_would(mixed: Running) -> None:
    client = mixed.client("policy")
    model = client.new_model(client.new_session(), 0, rank=4)
    start = client.result(client.asked("save_weights", model_id=model, seq_id=1, path="start"))
    generator = np.random.default_rng(0)
    tokens, labels = generator.integers(3, VOCAB, (2, 12)).astype(np.int32)
    sampled_logprobs, advantages = generator.normal(size=(2, 12)).astype(np.float32)
    sampled_logprobs -= 5.0
    message: Any = MESSAGES["ForwardBackwardRequest"]()
    message.ParseFromString(loss_request(model, 2, [Datum(tokens, labels, advantages)]))
    message.loss_fn = "ppo"
    message.loss_fn_config_v2["clip_low_threshold"].number = 0.5
    inputs = message.data[0].loss_fn_inputs
    inputs["advantages"].CopyFrom(inputs["weights"])
    inputs["logprobs"].CopyFrom(inputs["weights"])
    inputs["logprobs"].dense = sampled_logprobs.tobytes()
    del inputs["weights"]
    body = message.SerializeToString()
    status, future = client.send("POST", "forward_backward", body, CONTENT_TYPE)
    assert status == 200, future
    adam = {**ADAM, "learning_rate": 0.01}
    client.result(client.asked("optim_step", model_id=model, seq_id=3, adam_params=adam))
    end = client.result(client.asked("save_weights", model_id=model, seq_id=4, path="end"))
    plain = AutoModelForCausalLM.from_pretrained(
        mixed.service.deployment.run.model_folder, dtype=torch.float64
    )
    reference = PeftModel.from_pretrained(plain, folder_of(mixed, start["path"]), is_trainable=True)
    lift_to_double(plain)
    logits = reference(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    own = logits.log_softmax(-1).gather(-1, torch.from_numpy(labels.astype(np.int64))[:, None])
    ratios = (own[:, 0] - torch.from_numpy(sampled_logprobs)).exp()
    gains = torch.from_numpy(advantages)
    (-torch.minimum(ratios * gains, ratios.clamp(0.5, 1.2) * gains).sum()).backward()
    trainable = [p for p in reference.parameters() if p.requires_grad]
    torch.optim.AdamW(trainable, lr=0.01, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0).step()
    found = load_file(folder_of(mixed, end["path"]) / "adapter_model.safetensors")
    for name, value in reference.named_parameters():
        if value.requires_grad:
            other = found[name.replace(".default", "")]
            torch.testing.assert_close(other, value.detach(), rtol=BAR, atol=BAR)
    (logprobs,) = logprobs_of(client.result(future))
    np.testing.assert_allclose(logprobs, own[:, 0].detach().numpy(), atol=FLOAT32_BAR)


def test_that_the_sampler_has_ended_is_the_operator_s_fault(
    mixed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mixed.client("unlucky")
    make = dict(session_id=client.new_session(), sampling_session_seq_id=0, base_model="base")
    sampler = client.asked("create_sampling_session", **make)["sampling_session_id"]

    def ended(_requests: object) -> None:
        raise EOFError

    def asked(seq_id: int) -> Any:
        return client.asked(
            "asample", sampling_session_id=sampler, seq_id=seq_id,
            prompt={"chunks": [{"tokens": [5]}]}, sampling_params={"max_tokens": 1},
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(mixed.service.sampling, "_sampled", ended)
        told = client.result(asked(0))
    assert told == {"error": "the sampler has ended; ask again", "category": "server"}
    assert isinstance(client.result(asked(1)), bytes)
