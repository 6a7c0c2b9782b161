"""A linear layer's place in the model, where base and adapters meet what is around them.

Shape suffixes: i and o input and output features of this rank's shard, O of the whole layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from lobra.model.own_vector import OwnVector
from lobra.model.stack import Stack
from lobra.model.tensor_parallel import Group, reduce_from_group


class AdaptedLinear(nn.Module):
    """A linear layer's place in the model: its base and, in the stack, its adapters.

    Column-parallel it returns this rank's slice of the output; row-parallel the whole, summed over
    the group before the bias is added.
    """

    def __init__(
        self,
        stack: Stack,
        linear: int,
        group: Group = None,
        bias_O: Tensor | None = None,
        own_bias: OwnVector | None = None,
    ) -> None:
        """Be linear number ``linear`` of the stack; its output is summed over ``group``.

        ``own_bias`` are the biases that tasks have instead of its own.
        """
        super().__init__()
        self.base = stack.bases[linear]
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.stack = stack
        self.linear = linear
        self.group = group
        self.own_bias = own_bias

    @property
    def out_features(self) -> int:
        """Return o."""
        return len(self.stack.shards[self.linear].outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., o] (column-parallel) or [..., O] (row-parallel) of x [..., i]."""
        name = self.stack.sites[self.linear].module
        y = reduce_from_group(self.stack.output(x, self.linear), self.group, name)
        if self.bias is not None:
            y = y + self.bias
        return y if self.own_bias is None else self.own_bias.replaced(y, self._with_bias)

    def _with_bias(self, y: Tensor, own_o: Tensor) -> Tensor:
        """Return outputs with another bias than the base's, which they have."""
        base_o = self.base.bias if self.bias is None else self.bias
        assert base_o is not None
        return y + (own_o - base_o).to(y.dtype)
