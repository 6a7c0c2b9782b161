"""Values of the host on their way to where a rank computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor's values on the device; the host does not wait for a GPU to have them."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def sent_together(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Return arrays [n] on the device, as parts of one tensor and so by one copy."""
    whole = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    return list(whole.split([len(array) for array in arrays]))
