"""Time of a layer from a model's shapes and a device's peaks: a roofline, calibrated.

A layer takes what it costs to start, and on the device matrix products (bounded by arithmetic or by
reading the weights), attention, moving activations through memory, and the all-reduces of its tp
group: the sum of both, or, where the host starts ahead of the device, the longer of the start and
of all but attention, which comes on top. The shares of the peaks that are reached come from
measured rows where there are any (`calibration.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lobra.layout.base_precision import FP8
from lobra.layout.layout import ADAPTER_HIDDEN, ATTENTION, COMPUTED_AGAIN
from lobra.layout.shapes import ModelShape
from lobra.profiler.accelerators import Accelerator, Efficiency
from lobra.profiler.estimate_memory import base_bytes, dropout_factor_bytes, layer_weights
from lobra.profiler.exchange import FLOAT_BYTES
from lobra.profiler.head import PROFILED_SHARE
from lobra.profiler.layer_memory import ROW_PARALLEL, LayerMemory, element_bytes

Array = np.ndarray
Sizes = np.ndarray | float

# The frozen weights take part in the forward product and in that of the input's gradient.
PASSES = 2
# Flash attention (Dao, 2023): the backward pass has 2.5 times the products of the forward one;
# half of the s x s positions are masked.
ATTENTION_BACKWARD = 2.5
# What autograd needs is written and read back; as much again is written and read but not kept. Half
# of it is the forward pass's.
MEMORY_PASSES = 4
ROUNDING_PASSES = 4  # of an input in 16 bits: read for its largest value, read, written, read
ALL_REDUCES = 4  # of a layer: after attention and after the mlp, forward and backward
START_FORWARD = 1 / 3  # the forward pass's share of what a layer takes to start
# Of what a layer takes to start: embedding and norm, and these with head and loss. Measured on an
# H200 (on a CPU, in a small model, they are a fifth and a third).
BASE_START, HEAD_START = 1 / 8, 1 / 4
# By the loss (`model/head.py`), of the logits in fp32: written, read for the largest; read and
# written to subtract it, for exp and for the quotient; read for the sum and as the gradient.
LOGIT_PASSES = 10
ROUNDED_LOGIT_PASSES = 4  # of the product in 16 bits, and of the gradient: written, read


@dataclass(frozen=True)
class Workload:
    """What is timed: the model, the accelerator's use of it, and the adapters.

    ``memory`` and what follows are as `LayerMemory` has them.
    """

    shape: ModelShape
    accelerator: Accelerator
    precision: str
    lora_rank: int
    gpus_per_node: int = 8
    memory: str = "keep"
    sequence_parallel: bool = False
    keeps_elementwise: bool = False
    dropout_modules: tuple[str, ...] = ()

    @property
    def starts(self) -> float:
        """Return how often the layer starts; once is forward and backward."""
        return 1.0 + (START_FORWARD if self.layer(1).runs_again else 0.0)

    def layer(self, tp: int) -> LayerMemory:
        """Return what a layer holds on a rank of a tp group."""
        return LayerMemory(
            self.shape,
            tp,
            self.precision,
            self.lora_rank,
            self.memory,
            self.sequence_parallel,
            self.keeps_elementwise,
        )

    @property
    def peak(self) -> float:
        """Return the floating-point operations per ms of matrix products at best."""
        return self.accelerator.flops_per_ms(self.precision)


def matmul_ms(work: Workload, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of the frozen linears' and adapters' products at the device's peaks."""
    tokens = np.asarray(b) * np.asarray(s)
    x_again = int(ADAPTER_HIDDEN in COMPUTED_AGAIN[work.memory])
    weights, adapters = weights_used(work), 0
    for module, (inputs, outputs) in work.shape.linear_sizes().items():
        again = int(module in COMPUTED_AGAIN[work.memory])
        adapters += (PASSES + 1 + x_again) * inputs + (PASSES + 1 + again) * outputs
    flops = 2.0 * tokens * (weights + work.lora_rank * adapters) / tp
    read = element_bytes(work.precision) * weights / tp
    busy_ms = flops / work.peak
    if work.shape.quantised == FP8:
        forward = 2.0 * tokens * (weights - layer_weights(work.shape)) / tp
        busy_ms += forward * (1 / work.accelerator.flops_per_ms(FP8) - 1 / work.peak)
    return np.maximum(busy_ms, read / _bytes_per_ms(work.accelerator.memory_gb_s))


def weights_used(work: Workload) -> int:
    """Return the elements of a layer's frozen weights, as often as they are multiplied by."""
    return sum(
        (PASSES + int(module in COMPUTED_AGAIN[work.memory])) * inputs * outputs
        for module, (inputs, outputs) in work.shape.linear_sizes().items()
    )


def quantising_ms(work: Workload, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of making weights from quantised ones at the device's bandwidth, each time anew.

    In fp8 they are made for the gradient of the input only; the input of each product is rounded.
    """
    tokens, shape = np.asarray(b) * np.asarray(s), work.shape
    if shape.quantised is None:
        return np.zeros(np.shape(tokens))
    e, rounded = element_bytes(work.precision), 0.0
    moved = base_bytes(shape, tp, work.precision) + e * layer_weights(shape) / tp
    if shape.quantised == FP8:
        for module, (inputs, _) in shape.linear_sizes().items():
            again = int(module in COMPUTED_AGAIN[work.memory])
            rounded += (1 + again) * inputs / (tp if module in ROW_PARALLEL else 1)
    else:
        moved *= weights_used(work) / layer_weights(shape)
    moved = moved + (ROUNDING_PASSES * e + 1) * rounded * tokens
    return moved / _bytes_per_ms(work.accelerator.memory_gb_s)


def attention_ms(work: Workload, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of attention's products at the device's peak."""
    width = work.shape.num_heads * work.shape.head_dim / tp
    forwards = 2 if ATTENTION in COMPUTED_AGAIN[work.memory] else 1
    products = (forwards + ATTENTION_BACKWARD) / 2
    return 4.0 * products * np.asarray(b) * np.square(s) * width / work.peak


def memory_ms(work: Workload, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of moving activations through memory at the device's bandwidth."""
    layer = work.layer(tp)
    dropped = sum(dropout_factor_bytes(work.shape, tp, work.precision, work.dropout_modules))
    per_token = MEMORY_PASSES * (layer.saved_bytes + dropped + layer.computed_again_bytes / 2)
    moved = per_token * np.asarray(b) * np.asarray(s)
    return moved / _bytes_per_ms(work.accelerator.memory_gb_s)


def all_reduce_ms(work: Workload, efficiency: Efficiency, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of a layer's all-reduces: a ring inside the node, then between the nodes."""
    if tp == 1:
        return np.zeros(np.broadcast_shapes(np.shape(b), np.shape(s)))
    tokens = np.asarray(b) * np.asarray(s)
    num_bytes = element_bytes(work.precision) * work.shape.hidden_size * tokens
    inside = min(tp, work.gpus_per_node)
    link = _bytes_per_ms(work.accelerator.link_gb_s) * efficiency.link
    time_ms = efficiency.collective_start_ms + 2.0 * (inside - 1) / inside * num_bytes / link
    nodes = -(-tp // work.gpus_per_node)
    if nodes > 1:
        network = _bytes_per_ms(work.accelerator.network_gb_s) * efficiency.network
        time_ms = time_ms + 2.0 * (nodes - 1) / nodes * num_bytes / network
        time_ms = time_ms + efficiency.collective_start_ms
    return all_reduces(work.memory) * time_ms


def all_reduces(memory: str) -> int:
    """Return the all-reduces of a layer under a memory policy, those computed again included.

    What is after the last product is never computed again.
    """
    return ALL_REDUCES + int("o_proj" in COMPUTED_AGAIN[memory])


def moving_ms(work: Workload, efficiency: Efficiency, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of all that a layer moves through memory and over links."""
    through_memory = memory_ms(work, tp, b, s) + quantising_ms(work, tp, b, s)
    return through_memory / efficiency.memory + all_reduce_ms(work, efficiency, tp, b, s)


def hideable_ms(work: Workload, efficiency: Efficiency, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of what a layer may start ahead of: all that the device does but attention."""
    linears_ms = matmul_ms(work, tp, b, s) / efficiency.matmul
    return linears_ms + moving_ms(work, efficiency, tp, b, s)


def layer_ms(work: Workload, efficiency: Efficiency, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of one layer, forward + backward with LoRA (arrays broadcast).

    What attention's products take is not hidden behind the start: so it was in rows of an H200, and
    so a cost model, whose term of b s^2 is added to one of the tokens, can follow.
    """
    device_ms = hideable_ms(work, efficiency, tp, b, s)
    started_ms = _started(efficiency, work.starts, device_ms)
    return started_ms + attention_ms(work, tp, b, s) / efficiency.attention


def base_ms(work: Workload, efficiency: Efficiency, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of embedding and last norm, forward + backward, with no loss at all."""
    return _started(efficiency, BASE_START, _base_device_ms(work, efficiency, b, s))


def head_ms(work: Workload, efficiency: Efficiency, tp: int, b: Sizes, s: Sizes) -> Array:
    """Return ms of embedding, head and loss, forward + backward.

    ``PROFILED_SHARE`` of the tokens carry a loss.
    """
    logits = PROFILED_SHARE * np.asarray(b) * np.asarray(s) * work.shape.vocab_size / tp
    flops = 2.0 * PASSES * logits * work.shape.hidden_size
    moved = (
        LOGIT_PASSES * FLOAT_BYTES + ROUNDED_LOGIT_PASSES * element_bytes(work.precision)
    ) * logits
    device_ms = (
        _base_device_ms(work, efficiency, b, s)
        + flops / work.peak / efficiency.matmul
        + moved / _bytes_per_ms(work.accelerator.memory_gb_s) / efficiency.memory
    )
    return _started(efficiency, HEAD_START, device_ms)


def _started(efficiency: Efficiency, starts: float, device_ms: Array) -> Array:
    """Return ms of what starts so often as a layer and takes the device so long."""
    start_ms = efficiency.start_ms * starts
    if efficiency.starts_ahead:
        return np.maximum(start_ms, device_ms)
    return start_ms + device_ms


def _base_device_ms(work: Workload, efficiency: Efficiency, b: Sizes, s: Sizes) -> Array:
    tokens = np.asarray(b) * np.asarray(s)
    moved = 2.0 * MEMORY_PASSES * element_bytes(work.precision) * work.shape.hidden_size * tokens
    return moved / _bytes_per_ms(work.accelerator.memory_gb_s) / efficiency.memory


def _bytes_per_ms(gb_s: float) -> float:
    return 1e6 * gb_s
