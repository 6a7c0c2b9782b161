"""What a layer holds of a micro-batch, counted tensor by tensor from the model's shapes.

A test compares the counts with the tensors that are really held. Bytes a token and rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lobra.layout.layout import ADAPTER_HIDDEN, ATTENTION, COMPUTED_AGAIN
from lobra.layout.shapes import ModelShape
from lobra.profiler.exchange import FLOAT_BYTES

ROW_PARALLEL = ("o_proj", "down_proj")  # split by their input, as `model.sharded_layer` has it
#: What of a policy's tensors the backward pass itself needs; of the others it needs what is
#: computed of them.
NEEDED = ("v_proj", ATTENTION, "gate_proj", "up_proj", ADAPTER_HIDDEN)


# Ranks of several tasks computed at once, as `model.joint_stack` has it (a test compares them).
MOST_RANKS = 256


def joint_rank(ranks: Sequence[int]) -> int:
    """Return the most ranks a token goes through where tasks are computed at once."""
    return max(max(ranks, default=0), min(MOST_RANKS, sum(ranks)))


def element_bytes(precision: str) -> int:
    """Return the bytes of an activation's element."""
    return 2 if precision == "bf16" else FLOAT_BYTES


def adapter_hidden_bytes(shape: ModelShape, precision: str, rank: int) -> int:
    """Return what x A' of all of a layer's linears takes for a token, in bytes."""
    return element_bytes(precision) * rank * len(shape.linear_sizes())


@dataclass(frozen=True)
class LayerMemory:
    """One layer of a rank of a tp group, and what is kept of it.

    Attributes
    ----------
    lora_rank
        Of the adapters a token goes through, which are on every linear.
    memory
        The memory policy.
    sequence_parallel
        Whether what tp does not split is split by the sequence.
    keeps_elementwise
        Whether "keep" keeps, as autograd does by itself, also what is cheap to compute again.
    """

    shape: ModelShape
    tp: int
    precision: str
    lora_rank: int
    memory: str = "keep"
    sequence_parallel: bool = False
    keeps_elementwise: bool = False

    @property
    def runs_again(self) -> bool:
        """Whether the backward pass computes some of the layer again."""
        return self.memory != "keep" or not self.keeps_elementwise

    @property
    def saved_bytes(self) -> float:
        """What autograd needs of one run of the layer.

        Whole on every rank (unless sequence parallel): the inputs of both norms in fp32 and their
        outputs. Split by tp: q, k, v, the attention's output and its log-sum-exp, gate, up,
        silu(gate) and their product. x A' of each linear. Dropout's factors are drawn anew.
        """
        shape, e = self.shape, element_bytes(self.precision)
        whole = 2 * FLOAT_BYTES * (shape.hidden_size + 1) + 2 * e * shape.hidden_size
        split = self._outputs["q_proj"] + 2 * e * shape.intermediate_size / self.tp
        split += self._outputs["k_proj"] + sum(self._outputs[name] for name in NEEDED)
        return self._whole(whole) + split

    @property
    def kept_bytes(self) -> float:
        """What stays until the backward pass reaches the layer: its input and what is dear."""
        if not self.runs_again:
            return self.saved_bytes
        whole = element_bytes(self.precision) * self.shape.hidden_size
        whole *= 1 + self.shape.norms_behind  # a norm needs what the last product gave
        return self._whole(whole) + sum(self._kept_outputs.values())

    @property
    def computed_again_bytes(self) -> float:
        """What the backward pass computes again."""
        if not self.runs_again:
            return 0.0
        return self.saved_bytes - sum(self._kept_outputs.get(name, 0.0) for name in NEEDED)

    @property
    def held_again_bytes(self) -> float:
        """What the layer holds besides while the backward pass is in it: all that a run needs.

        That run takes over what was kept of the first.
        """
        return self.saved_bytes - sum(self._kept_outputs.values()) if self.runs_again else 0.0

    @property
    def _outputs(self) -> dict[str, float]:
        """The output of each product but the last, of attention with its log-sum-exp, and x A'."""
        shape, e = self.shape, element_bytes(self.precision)
        query = shape.num_heads * shape.head_dim / self.tp
        key = max(shape.num_kv_heads / self.tp, 1) * shape.head_dim  # a rank holds at least one
        ffn = shape.intermediate_size / self.tp
        split = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": ffn, "up_proj": ffn}
        return {name: e * size for name, size in split.items()} | {
            ATTENTION: e * query + FLOAT_BYTES * shape.num_heads / self.tp,
            "o_proj": self._whole(e * shape.hidden_size),
            ADAPTER_HIDDEN: adapter_hidden_bytes(shape, self.precision, self.lora_rank),
        }

    @property
    def _kept_outputs(self) -> dict[str, float]:
        again = COMPUTED_AGAIN[self.memory]
        return {name: size for name, size in self._outputs.items() if name not in again}

    def _whole(self, size: float) -> float:
        return size / self.tp if self.sequence_parallel else size
