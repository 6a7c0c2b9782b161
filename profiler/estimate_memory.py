"""Memory of a rank from a model's shapes alone: which micro-batches fit a layout, without hardware.

Bytes; e is the size of an activation's element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lobra.layout.base_precision import NF4, NF4_BLOCK, SCALE_BLOCK
from lobra.layout.shapes import ModelShape
from lobra.layout.world import adapted_layers, stage_layers
from lobra.profiler.accelerators import Runtime
from lobra.profiler.capacity import Parts
from lobra.profiler.exchange import (
    ADAPTER_BYTES,
    FLOAT_BYTES,
    OPTIMIZER_BYTES,
    most_exchange_bytes,
)
from lobra.profiler.layer_memory import ROW_PARALLEL, LayerMemory, element_bytes, joint_rank
from lobra.tasks.config import TaskConfig

# Logits the loss holds at once, as `model.head` has it (a test compares them).
LOGITS_AT_ONCE = 1 << 25
# Beside a weight in nf4: of a row its number; what the values of scales in 8 bits are.
INDEX_BYTES, CODE_BYTES = 8, 1024


@dataclass(frozen=True)
class Adapters:
    """The adapters trained together: (rank, target modules) of each task.

    ``dropout_modules`` are those of the task with dropout that keeps most for it, () without any.
    """

    specs: tuple[tuple[int, tuple[str, ...]], ...]
    dropout_modules: tuple[str, ...] = ()

    def elements(self, shape: ModelShape, layers: range) -> int:
        """Return the adapters' parameters in some of the `adapted_layers`, all tasks."""
        return sum(shape.adapter_elements(rank, targets, layers) for rank, targets in self.specs)

    @classmethod
    def of_tasks(cls, tasks: Sequence[TaskConfig], shape: ModelShape) -> Adapters:
        """Return the adapters of tasks; the dropout is that of the task which keeps most for it."""
        dropped: tuple[str, ...] = ()
        for task in tasks:
            if task.lora_dropout > 0.0 and _inputs(shape, task.target_modules) > _inputs(
                shape, dropped
            ):
                dropped = task.target_modules
        return cls(tuple((task.largest_rank, task.target_modules) for task in tasks), dropped)

    @property
    def largest_rank(self) -> int:
        """Return the largest LoRA rank."""
        return max((rank for rank, _ in self.specs), default=0)

    @property
    def joint_rank(self) -> int:
        """Return the most ranks a token goes through where tasks are computed at once."""
        return joint_rank([rank for rank, _ in self.specs])


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a rank that do not depend on the micro-batch, and those per token of it.

    Of the former ``elements`` adapter parameters take ``bytes_per_element`` each.

    The first ``logits_tokens`` tokens take ``logits_bytes_per_token`` besides: the loss holds no
    more logits than those at once. ``exchange_bytes`` are taken when no micro-batch is.
    """

    fixed_bytes: float
    bytes_per_token: float
    logits_bytes_per_token: float = 0.0
    logits_tokens: float = math.inf
    exchange_bytes: float = 0.0
    elements: float = 0.0
    bytes_per_element: float = 0.0

    def total_bytes(self, tokens: float) -> float:
        """Return the bytes of a rank for a micro-batch of so many tokens."""
        logits = self.logits_bytes_per_token * min(tokens, self.logits_tokens)
        return self.fixed_bytes + max(self.bytes_per_token * tokens + logits, self.exchange_bytes)

    def parts(self, tokens: int) -> Parts:
        """Return the parts, what a token takes being that of micro-batches of about ``tokens``."""
        logits = self.logits_bytes_per_token
        at_once = min(tokens, self.logits_tokens)
        return Parts(
            weight_bytes=self.fixed_bytes - self.elements * self.bytes_per_element,
            elements=self.elements,
            bytes_per_element=self.bytes_per_element,
            exchange_bytes_per_element=self.exchange_bytes / max(1.0, self.elements),
            tokens=tokens,
            activation_bytes=self.bytes_per_token * tokens + logits * at_once,
            bytes_per_token=self.bytes_per_token + (logits if tokens <= self.logits_tokens else 0),
        )

    def max_tokens(self, budget_bytes: float, step: int, largest: int) -> int:
        """Return the largest multiple of ``step`` up to ``largest`` that fits (0: none)."""
        room = budget_bytes - self.fixed_bytes
        if room < self.exchange_bytes:
            return 0
        tokens = room / (self.bytes_per_token + self.logits_bytes_per_token)
        if tokens > self.logits_tokens:
            tokens = (room - self.logits_bytes_per_token * self.logits_tokens) / (
                self.bytes_per_token
            )
        return max(0, min(int(tokens) // step, largest // step) * step)


def _inputs(shape: ModelShape, modules: Iterable[str]) -> int:
    return sum(shape.linear_sizes()[module][0] for module in shape.layer_modules(modules))


def layer_weights(shape: ModelShape) -> int:
    """Return the parameters of one layer's linears."""
    return sum(inputs * outputs for inputs, outputs in shape.linear_sizes().values())


def base_bytes(shape: ModelShape, tp: int, precision: str) -> float:
    """Return what a rank keeps of one layer's linears, as `model.quantised_linear` has them."""
    elements = layer_weights(shape)
    if shape.quantised is None:
        return element_bytes(precision) * elements / tp
    rows = sum(
        outputs / (1 if name in ROW_PARALLEL else tp)
        for name, (_, outputs) in shape.linear_sizes().items()
    )
    if shape.quantised != NF4:
        return elements / tp + FLOAT_BYTES * rows
    scales = elements / NF4_BLOCK  # of one byte; theirs are of the whole weight
    beside = INDEX_BYTES * rows + CODE_BYTES * len(shape.linear_sizes())
    return (elements / 2 + scales) / tp + FLOAT_BYTES * scales / SCALE_BLOCK + beside


def dequantised_bytes(shape: ModelShape, tp: int, precision: str) -> float:
    """Return what the largest weight takes while a quantised one is multiplied by."""
    if shape.quantised is None:
        return 0.0
    largest = max(inputs * outputs for inputs, outputs in shape.linear_sizes().values())
    return element_bytes(precision) * largest / tp


def dropout_factor_bytes(
    shape: ModelShape, tp: int, precision: str, dropout_modules: tuple[str, ...]
) -> list[float]:
    """Return the bytes per token of each linear's dropout factors; none are kept."""
    return [
        element_bytes(precision) * inputs / (tp if module in ROW_PARALLEL else 1)
        for module in shape.layer_modules(dropout_modules)
        for inputs in [shape.linear_sizes()[module][0]]
    ]


def logits_bytes_per_token(shape: ModelShape, tp: int, precision: str, in_chunks: bool) -> float:
    """Return what the logits take at their peak per token of which they are held at once.

    Whole: in fp32, their gradient, and both once more in the activations' type. In chunks they
    become their gradient in place.
    """
    if in_chunks:
        cast = element_bytes(precision) if precision == "bf16" else 0
        return (FLOAT_BYTES + cast) * shape.vocab_size / tp
    return (2 * FLOAT_BYTES + element_bytes(precision)) * shape.vocab_size / tp


def estimate_memory(
    shape: ModelShape,
    tp: int,
    pp: int,
    adapters: Adapters,
    precision: str,
    runtime: Runtime,
    memory: str = "keep",
) -> MemoryEstimate:
    """Return the memory of the rank of ``<tp,pp>`` that needs most.

    Every token carries a loss. Stage i of pp keeps pp - i micro-batches in flight (1F1B). The
    stages differ in what is fixed and in what grows; the one returned needs most only if one does
    everywhere, so the worst at the size where the fixed part and the rest are alike is taken.
    Evaluation keeps no activations for a backward pass and no gradient in the head: it needs less.
    The adapters' exchange is counted for our runtime only (`exchange.most_exchange_bytes`).
    """
    stages = stage_memories(shape, tp, pp, adapters, precision, runtime, memory)
    typical = sum(s.fixed_bytes for s in stages) / sum(s.bytes_per_token for s in stages)
    return max(stages, key=lambda s: s.total_bytes(typical))


def stage_memories(
    shape: ModelShape,
    tp: int,
    pp: int,
    adapters: Adapters,
    precision: str,
    runtime: Runtime,
    memory: str = "keep",
) -> list[MemoryEstimate]:
    """Return the memory of a rank of each stage of ``<tp,pp>``."""
    return [
        _stage_memory(shape, tp, pp, stage, adapters, precision, runtime, memory)
        for stage in range(pp)
    ]


def _stage_memory(
    shape: ModelShape,
    tp: int,
    pp: int,
    stage: int,
    adapters: Adapters,
    precision: str,
    runtime: Runtime,
    memory: str,
) -> MemoryEstimate:
    e = element_bytes(precision)
    own_layers = stage_layers(shape.num_layers, pp, stage)
    layers = len(own_layers)
    vocabulary_matrices = int(stage == 0) + int(stage == pp - 1)  # embedding, head
    if pp == 1 and shape.tied_embeddings:
        vocabulary_matrices = 1
    elements = adapters.elements(shape, adapted_layers(own_layers, shape.num_layers))
    fixed = layers * base_bytes(shape, tp, precision) + dequantised_bytes(shape, tp, precision)
    fixed += e * vocabulary_matrices * shape.vocab_size * shape.hidden_size / tp
    whole = tp if runtime.adapters_sharded else 1
    per_element = ADAPTER_BYTES / whole + OPTIMIZER_BYTES / tp
    fixed += per_element * elements
    exchange = 0 if runtime.adapters_sharded else most_exchange_bytes(elements, tp)
    of_adapters = {
        "exchange_bytes": float(exchange),
        "elements": float(elements),
        "bytes_per_element": per_element,
    }
    dropped = adapters.dropout_modules
    layer = LayerMemory(
        shape,
        tp,
        precision,
        adapters.largest_rank if runtime.adapters_sharded else adapters.joint_rank,
        memory,
        runtime.sequence_parallel,
        runtime.keeps_elementwise,
    )
    in_flight = pp - stage
    per_token = in_flight * layers * layer.kept_bytes + layer.held_again_bytes
    # One layer's gradients while the backward pass is in it, or a linear's dropout: its bits
    # (int16), the factors and the input times them.
    per_token += max(
        e * (2 * shape.hidden_size + 3 * shape.intermediate_size / tp),
        (2 + 2 / e) * max(dropout_factor_bytes(shape, tp, precision, dropped), default=0.0),
    )
    per_token *= runtime.activation_factor
    if stage < pp - 1:
        return MemoryEstimate(fixed, per_token, **of_adapters)
    logits = logits_bytes_per_token(shape, tp, precision, runtime.loss_in_chunks)
    if not runtime.loss_in_chunks:
        return MemoryEstimate(fixed, per_token + logits, **of_adapters)
    per_token += 2 * e * shape.hidden_size  # hidden states of the targets, and their gradients
    at_once = LOGITS_AT_ONCE / (shape.vocab_size / tp)
    return MemoryEstimate(fixed, per_token, logits, at_once, **of_adapters)
