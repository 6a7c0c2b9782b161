"""Values of the host on their way to where a rank computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor's values on the device; the host does not wait for a GPU to have them."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
