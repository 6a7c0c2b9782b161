"""A line of metrics.jsonl: what reports read of it, with its types; what else is there is kept."""

from __future__ import annotations

from typing import (
    Annotated,
    NotRequired,  # pydantic asks for these before Python 3.12
)

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from lobra.common.models import Count, Flag, NotNegative, Number, Positive, PositiveInt, Text


class LoggedTask(TypedDict):
    """One task's step; a loss that was not finite is null."""

    loss: Number | None
    sequences: Count
    applied: Flag
    own_step: NotRequired[Count]
    validation_loss: NotRequired[Number | None]
    stopped: NotRequired[str | None]


class LoggedBatch(TypedDict):
    """Which examples of a task a step trained."""

    own_step: Count
    epoch: Count
    position: Count
    size: PositiveInt
    examples: PositiveInt
    digest: Text


class LoggedReplica(TypedDict):
    """One replica's step."""

    layout: Text
    busy_s: NotNegative
    predicted_s: NotNegative
    micro_batches: Count
    padded_tokens: Count


class LoggedStep(TypedDict):
    """One step; what older versions did not note may be missing."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: Count
    step_time_s: Positive
    predicted_step_time_s: NotNegative
    tokens: PositiveInt
    padded_tokens: PositiveInt
    gpu_seconds: NotNegative
    memory_bytes: Count
    tasks: dict[str, LoggedTask]
    replicas: Annotated[list[LoggedReplica], Field(min_length=1)]
    dispatch_wait_s: NotRequired[NotNegative]
    prepare_time_s: NotRequired[NotNegative]
    replica_wait_s: NotRequired[NotNegative]
    reduce_time_s: NotRequired[NotNegative]
    optimizer_time_s: NotRequired[NotNegative]
    validation_time_s: NotRequired[NotNegative]
    checkpoint_time_s: NotRequired[NotNegative]
    plan_from: NotRequired[Count]
    drawn: NotRequired[dict[str, LoggedBatch]]
