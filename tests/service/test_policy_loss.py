"""The weights of a policy's loss give its gradient, which torch finds by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobra.service.policy_loss import PolicyLoss

tokens = st.tuples(st.floats(-3.0, 0.0), st.floats(-3.0, 0.0), st.floats(-2.0, 2.0))


@given(st.lists(tokens, min_size=1, max_size=8), st.booleans())
def test_weights_are_the_gradient(drawn: list[tuple[float, float, float]], clips: bool) -> None:
    logprobs, sampled, advantages = np.array(drawn).T
    ratios = np.exp(logprobs - sampled)
    if (np.abs(ratios[:, None] - [0.8, 1.2]) < 1e-9).any():
        return  # the loss has a corner there
    loss = PolicyLoss(0.8, 1.2) if clips else PolicyLoss()
    leaf = torch.tensor(logprobs, requires_grad=True)
    ratio = (leaf - torch.from_numpy(sampled)).exp()
    gained = ratio * torch.from_numpy(advantages)
    clipped = ratio.clamp(0.8, 1.2) * torch.from_numpy(advantages)
    value = -(torch.minimum(gained, clipped) if clips else gained).sum()
    value.backward()
    assert leaf.grad is not None
    assert loss.value(logprobs, sampled, advantages) == pytest.approx(value.item())
    weights = loss.weights(logprobs, sampled, advantages)
    np.testing.assert_allclose(-weights, leaf.grad.numpy(), rtol=1e-12, atol=1e-12)
