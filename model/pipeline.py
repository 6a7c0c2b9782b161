"""The 1F1B pipeline schedule over one replica's micro-batches (PipeDream-flush, Megatron-LM).

Every rank of a replica knows the shapes of all its micro-batches beforehand, so no metadata is
exchanged. Micro-batches may differ in rows and in length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lobra.model.groups import ReplicaGroups
from lobra.model.heartbeat import beat
from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.precision import kept_dtype
from lobra.model.stage import Stage
from lobra.model.token_tasks import TokenTasks


class _Losses:
    """The losses of a replica's micro-batches: each task's sum and, if asked for, more."""

    def __init__(
        self,
        stage: Stage,
        num_tasks: int,
        token_losses: list[Tensor] | None,
        outcomes: Tensor | None,
    ) -> None:
        dtype = kept_dtype(stage.dtype)
        self.of_tasks = torch.zeros(num_tasks, dtype=dtype, device=stage.device)
        self.token_losses = token_losses
        self.outcomes = outcomes

    def add(self, batch: MicroBatchTensors, losses_P: Tensor) -> None:
        self.of_tasks.index_add_(0, batch.targets.tasks_P, batch.targets.learned(losses_P))
        if self.token_losses is not None:
            self.token_losses.append(losses_P)
        if self.outcomes is not None and batch.examples is not None:
            self.outcomes += batch.examples.outcomes(losses_P, len(self.of_tasks))


def run_replica(
    stage: Stage,
    batches: Sequence[MicroBatchTensors],
    num_tasks: int,
    token_losses: list[Tensor] | None = None,
    outcomes: Tensor | None = None,
) -> Tensor:
    """Run forward and backward of all micro-batches; gradients add up in the adapters.

    On the last stage ``token_losses`` gets the losses of each micro-batch's targets, and to
    ``outcomes`` [num_tasks, `model.objectives.OUTCOMES`] those of the examples are added.

    Returns
    -------
    The summed losses of each task's targets [num_tasks], as they are learned; non-zero only on the
    last stage; fp32 (in fp64: fp64).
    """
    losses = _Losses(stage, num_tasks, token_losses, outcomes)
    if stage.groups.place.layout.pp == 1:
        for batch in batches:
            beat("computing")
            weighted, losses_P = stage.loss(stage.hidden(batch, None), batch)
            if weighted.requires_grad:  # not where nothing is learned
                weighted.backward()
            losses.add(batch, losses_P)
    else:
        _OneForwardOneBackward(stage, batches, losses).run()
    return losses.of_tasks


@torch.no_grad()
def evaluate_replica(
    stage: Stage,
    batches: Sequence[MicroBatchTensors],
    num_tasks: int,
    token_losses: list[Tensor] | None = None,
    outcomes: Tensor | None = None,
    ends: list[Tensor] | None = None,
    with_dropout: bool = False,
) -> Tensor:
    """Run forward only over all micro-batches, without LoRA dropout unless it is asked for.

    On the last stage ``token_losses`` gets the losses of each micro-batch's targets, to
    ``outcomes`` [num_tasks, `model.objectives.OUTCOMES`] those of the examples are added, and
    ``ends`` gets the hidden states [N, D] of each micro-batch's last tokens.

    Returns
    -------
    The summed losses of each task's targets [num_tasks], as they are learned; non-zero only on the
    last stage; fp32 (in fp64: fp64).
    """
    losses = _Losses(stage, num_tasks, token_losses, outcomes)
    links = _Links(stage.groups)
    place = stage.groups.place
    for batch in batches:
        beat("evaluating")
        batch = batch if with_dropout else replace(batch, noise=None)
        received = None
        if not place.is_first_stage:
            received = links.exchange(receive_previous=hidden_like(stage, batch))[0]
        output = stage.hidden(batch, received)
        if place.is_last_stage:
            losses.add(batch, stage.loss(output, batch)[1])
            if ends is not None:
                ends.append(output.flatten(0, 1).index_select(0, batch.ends_N))
        else:
            links.exchange(send_next=output)
    return losses.of_tasks


def hidden_like(stage: Stage, batch: MicroBatchTensors) -> Tensor:
    """Return an uninitialised tensor for the hidden states [B, S, D] of a micro-batch."""
    size = (*batch.tokens_BS.shape, stage.shape.hidden_size)
    return torch.empty(size, dtype=stage.dtype, device=stage.device)


class _OneForwardOneBackward:
    """State of one pass over the micro-batches on one stage."""

    def __init__(self, stage: Stage, batches: Sequence[MicroBatchTensors], losses: _Losses) -> None:
        self.stage = stage
        self.batches = batches
        self.losses = losses
        self.links = _Links(stage.groups)
        # (received, output or loss, tasks) of the micro-batches whose backward is still to come.
        self.in_flight: list[tuple[Tensor | None, Tensor, TokenTasks]] = []
        self.num_backward = 0

    def run(self) -> None:
        place = self.stage.groups.place
        total = len(self.batches)
        warm_up = min(place.layout.pp - place.stage - 1, total)
        for index in range(warm_up):
            received = self._receive_input(index)
            output = self._forward(index, received)
            self.links.exchange(send_next=output)
        steady = total - warm_up
        received = self._receive_input(warm_up) if steady else None
        for step in range(steady):
            index = warm_up + step
            output = self._forward(index, received)
            gradient = self._exchange_with_next(output)
            input_gradient = self._backward(gradient)
            last = step == steady - 1
            received = self._exchange_with_previous(input_gradient, None if last else index + 1)
        for _ in range(warm_up):
            gradient = self.links.exchange(receive_next=self._hidden_like(self.num_backward))[1]
            self.links.exchange(send_previous=self._backward(gradient))

    def _hidden_like(self, index: int) -> Tensor:
        return hidden_like(self.stage, self.batches[index])

    def _receive_input(self, index: int) -> Tensor | None:
        if self.stage.groups.place.is_first_stage:
            return None
        return self.links.exchange(receive_previous=self._hidden_like(index))[0]

    def _forward(self, index: int, received: Tensor | None) -> Tensor:
        beat("computing")
        batch = self.batches[index]
        if received is not None:
            received.requires_grad_(True)
        output = self.stage.hidden(batch, received)
        if self.stage.groups.place.is_last_stage:
            output, losses_P = self.stage.loss(output, batch)
            self.losses.add(batch, losses_P)
        self.in_flight.append((received, output, self.stage.selection.tasks))
        return output

    def _backward(self, gradient: Tensor | None) -> Tensor | None:
        beat("computing")
        received, output, tasks = self.in_flight.pop(0)
        self.stage.selection.tasks = tasks  # layers that are computed again look them up again
        self.num_backward += 1
        if output.requires_grad:
            torch.autograd.backward(output, gradient)
        if received is None:
            return None
        # No adapter of these tasks lies on or before this stage: the gradient is still owed.
        return torch.zeros_like(received) if received.grad is None else received.grad

    def _exchange_with_next(self, output: Tensor) -> Tensor | None:
        if self.stage.groups.place.is_last_stage:
            return None
        expected = self._hidden_like(self.num_backward)
        return self.links.exchange(send_next=output, receive_next=expected)[1]

    def _exchange_with_previous(
        self, gradient: Tensor | None, next_index: int | None
    ) -> Tensor | None:
        if self.stage.groups.place.is_first_stage:
            return None
        expected = None if next_index is None else self._hidden_like(next_index)
        return self.links.exchange(send_previous=gradient, receive_previous=expected)[0]


class _Links:
    """Point-to-point exchange with the neighbouring stages, batched so that it cannot deadlock."""

    def __init__(self, groups: ReplicaGroups) -> None:
        self.groups = groups

    def exchange(
        self,
        *,
        send_next: Tensor | None = None,
        send_previous: Tensor | None = None,
        receive_next: Tensor | None = None,
        receive_previous: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Send and receive what is given; return (received from previous, from next)."""
        group = self.groups.pipe_group
        operations = []
        if send_previous is not None:
            payload = send_previous.detach().contiguous()
            operations.append(dist.P2POp(dist.isend, payload, self.groups.previous_rank, group))
        if receive_previous is not None:
            operations.append(
                dist.P2POp(dist.irecv, receive_previous, self.groups.previous_rank, group)
            )
        if send_next is not None:
            payload = send_next.detach().contiguous()
            operations.append(dist.P2POp(dist.isend, payload, self.groups.next_rank, group))
        if receive_next is not None:
            operations.append(dist.P2POp(dist.irecv, receive_next, self.groups.next_rank, group))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return receive_previous, receive_next
