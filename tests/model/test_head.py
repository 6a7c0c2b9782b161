"""The head with adapters: however few logits at once, losses and gradients are autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lobra.layout.shapes import ModelShape
from lobra.model.adapter import AdapterSpec
from lobra.model.dropout import TokenNoise, token_keys
from lobra.model.head import LogitScale, VocabParallelHead
from lobra.model.site import Site
from lobra.model.slot import Slot
from lobra.model.token_tasks import Segment, Selection, TokenTasks

SHAPE = ModelShape("small", 1, 16, 24, 2, 2, 8, 50)
SITE = Site(1, "lm_head", 16, 50)
SCALE = LogitScale(2.0, 3.0)
NOBODY = 100
#: (task, tokens): two have an adapter, 0 with dropout.
LENGTHS = ((0, 7), (NOBODY, 5), (1, 6), (0, 5))
CPU, DOUBLE = torch.device("cpu"), torch.float64


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def tokens_of() -> TokenTasks:
    """Return whose the tokens are."""
    stops = torch.tensor([0, *(length for _, length in LENGTHS)]).cumsum(0).tolist()
    numbers = [number for number, _ in LENGTHS]
    segments = tuple(map(Segment, numbers, stops[:-1], stops[1:]))
    odds = [0.3 if number == 0 else 0.0 for number, length in LENGTHS for _ in range(length)]
    keys = torch.from_numpy(token_keys([5], [len(odds)]))
    return TokenTasks(segments, TokenNoise.of_tokens(keys, torch.tensor(odds), DOUBLE))


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_any_number_of_logits_at_once(chunk: int) -> None:
    specs = {
        0: AdapterSpec("noisy", 2, 3.0, ("lm_head",), dropout=0.3),
        1: AdapterSpec("plain", 3, 2.0, ("lm_head",)),
    }
    slots = {n: Slot(n, s, SHAPE, SHAPE.adapted_layers, DOUBLE, CPU) for n, s in specs.items()}
    for number, slot in slots.items():
        slot.weights.copy_(random(slot.layout.numel, seed=number))
    tasks = tokens_of()
    num_tokens = tasks.segments[-1].stop
    weight, hidden = random(50, 16, seed=5), random(num_tokens, 16, seed=6).requires_grad_()
    targets = torch.arange(num_tokens) % 50
    factors = random(num_tokens, seed=7)
    head = VocabParallelHead(weight, range(50), None, 50, SCALE)
    head.chunk = chunk
    stack = head.adapted(SITE, Selection())
    stack.arrange(slots)
    losses = head.losses(hidden, targets, tasks)
    (losses * factors).sum().backward()

    own, states = {}, hidden.detach().clone().requires_grad_()
    logits = []
    for segment in tasks.segments:
        x = states[segment.start : segment.stop]
        product = functional.linear(x, weight)
        if segment.number in slots:
            slot = slots[segment.number]
            if segment.number not in own:
                named = slot.layout.named(slot.weights).values()
                own[segment.number] = [one.clone().requires_grad_() for one in named]
            A, B = own[segment.number]
            assert tasks.noise is not None
            noise = tasks.noise.part(slice(segment.start, segment.stop))
            left = x * noise.factors(stack.feature_keys[0], range(16))
            product = product + slot.spec.scaling(SITE) * left @ A.t() @ B.t()
        logits.append(3.0 * torch.tanh(product / 2.0 / 3.0))
    expected = functional.cross_entropy(torch.cat(logits), targets, reduction="none")
    (expected * factors).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(hidden.grad, states.grad)
    for number, slot in slots.items():
        found = slot.layout.named(slot.gradient).values()
        for gradient, parameter in zip(found, own[number], strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
