"""A stage whose own weights are trained: all of them, linears, norms, embedding and head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lobra.model.adapted_linear import AdaptedLinear
from lobra.model.adapter import AdapterSpec
from lobra.model.base_linear import DenseLinear, by_group
from lobra.model.checkpoint import HEAD, CheckpointReader, as_slice
from lobra.model.flat_tensors import FlatTensors
from lobra.model.held import HeldTensor, Size, held_tensors, owned_tensors
from lobra.model.own_vector import OwnNorm
from lobra.model.precision import in_double, kept_dtype
from lobra.model.slot import Slot
from lobra.model.stage import Stage
from lobra.model.trained_modules import TrainedHead, TrainedLinear


class TrainedWeights(Slot):
    """What a rank trains of the model, in the place of an adapter's slot.

    `weights` are in the stage's dtype, and what it computes with are views of them; `gradient` is
    in `kept_dtype`. Both hold the tensors that this rank keeps the optimiser's state of. What a
    tensor-parallel group shares is kept by its first rank, which gives it to the others.

    Attributes
    ----------
    tensors
        Those in `weights`, end to end, decayed ones first.
    num_decayed
        The elements of these.
    """

    def __init__(
        self, stage: Stage, number: int, spec: AdapterSpec, sizes: Mapping[str, Size]
    ) -> None:
        """Make a stage's weights trainable; ``sizes`` are those of the whole model's tensors."""
        self.number = number
        self.spec = spec
        self.layout = FlatTensors(())
        self.start = self.projections = None
        self.groups = stage.groups
        _replace_modules(stage)
        parameters = _parameters(stage)
        held = held_tensors(sizes, stage.shape, self.groups.place)
        assert parameters.keys() == {tensor.name for tensor in held}, "a stage is all that it holds"
        self.tensors = owned_tensors(held, self.groups.place)
        self.num_decayed = sum(tensor.numel for tensor in self.tensors if tensor.decays)
        owned = {tensor.name for tensor in self.tensors}
        summed = [tensor for tensor in held if tensor.has_partial_gradient]
        others = [tensor for tensor in summed if tensor.name not in owned]
        numel = sum(tensor.numel for tensor in self.tensors)
        more = sum(tensor.numel for tensor in others)
        self.weights = torch.empty(numel, dtype=stage.dtype, device=stage.device)
        kept = kept_dtype(stage.dtype)
        self.gradient = torch.zeros(numel + more, dtype=kept, device=stage.device)
        gradients, start = {}, 0
        for tensor in (*self.tensors, *others):
            place = slice(start, start + tensor.numel)
            start = place.stop
            parameter = parameters[tensor.name]
            if tensor.name in owned:
                own = self.weights[place].view(parameter.shape)
                own.copy_(parameter.data)
                parameter.data = own
            gradient = gradients[tensor.name] = self.gradient[place].view(parameter.shape)
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(partial(_accumulate, gradient))
        self._summed = [gradients[tensor.name] for tensor in summed]
        self._shared = [parameters[tensor.name].data for tensor in held if tensor.is_shared]

    def sum_partial_gradients(self) -> None:
        """Sum over the tensor-parallel group what each rank has only its part of. Collective."""
        if self._summed:
            whole = torch.cat([own.flatten() for own in self._summed])
            dist.all_reduce(whole, group=self.groups.tp_group)
            _divide(whole, self._summed)

    def share(self) -> None:
        """Give what the tensor-parallel group shares to all of it. Collective."""
        if self._shared:
            whole = torch.cat([own.flatten() for own in self._shared])
            dist.broadcast(whole, self.groups.tp_ranks[0], group=self.groups.tp_group)
            _divide(whole, self._shared)

    def read(self, reader: CheckpointReader) -> Tensor:
        """Return what a checkpoint has in the place of `weights`, in the reader's dtype."""
        return torch.cat([_read(reader, tensor).flatten() for tensor in self.tensors])


def _read(reader: CheckpointReader, tensor: HeldTensor) -> Tensor:
    rows = [
        reader.read(tensor.name, as_slice(own), *tensor.parts[1:]) for own in tensor.stored_rows
    ]
    return by_group(rows, tensor.fused)


def _divide(whole: Tensor, parts: list[Tensor]) -> None:
    """Copy what lies end to end into tensors."""
    for part, own in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
        part.copy_(own.view(part.shape))


def _accumulate(into: Tensor, parameter: Tensor) -> None:
    """Add a parameter's gradient to what it has; autograd begins anew with the next micro-batch."""
    assert parameter.grad is not None
    into.add_(parameter.grad)
    parameter.grad = None


def _replace_modules(stage: Stage) -> None:
    """Put modules with gradients of their weights in the place of those with adapters."""
    for name, module in list(stage.decoder.named_modules()):
        if isinstance(module, AdaptedLinear):
            stage.decoder.set_submodule(name, TrainedLinear.of(module))
        elif isinstance(module, OwnNorm):
            if stage.dtype == torch.float64:
                in_double(module.norm)
            stage.decoder.set_submodule(name, module.norm)
    stage.stacks, stage.arranged = [], []
    if stage.head is not None:
        assert isinstance(stage.head.base, DenseLinear)
        weight = stage.head.base.weight
        if stage.shape.tied_embeddings and stage.groups.place.is_first_stage:
            weight = stage.decoder.embed_tokens.weight
        stage.head = TrainedHead.of(stage.head, weight)


def _parameters(stage: Stage) -> dict[str, nn.Parameter]:
    """Return a stage's parameters by their names in a checkpoint."""
    found = {}
    for name, parameter in stage.decoder.named_parameters():
        parts = name.replace(".linear.", ".").split(".")  # a fused one is inside of its place
        if parts[0] == "layers":
            parts[1] = str(stage.layers[int(parts[1])])
        found[".".join(["model", *parts])] = parameter
    if stage.head is not None and not stage.shape.tied_embeddings:
        assert isinstance(stage.head, TrainedHead)
        found[HEAD] = stage.head.weight
    return found
