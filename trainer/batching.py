"""How a run's micro-batches hold sequences: packed, or padded to which buckets."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching
from lobra.planner.bucketed.buckets import static_buckets
from lobra.tasks.dataset import TokenizedDataset

log = logging.getLogger(__name__)


def chosen_batching(
    batching: Batching | None, dp_bucket: str | None, dispatch: str | None, plan: Plan | None
) -> Batching:
    """Return how micro-batches hold sequences: as asked for, else as the plan says, else packed.

    Parameters
    ----------
    batching
        What was asked for by name.
    dp_bucket, dispatch
        What was asked for that only bucketed micro-batches have.

    Raises
    ------
    ConfigError
        If packed micro-batches were asked for, and something they do not have.
    """
    of_buckets = {"--dp-bucket": dp_bucket, "--dispatch": dispatch}
    given = " and ".join(f"{option} {value}" for option, value in of_buckets.items() if value)
    if batching == "packed" and given:
        raise ConfigError(
            f"{given}: only bucketed micro-batches have that; leave it out, or give --batching "
            f"bucketed"
        )
    planned: Batching = plan.meta.get("batching", "packed") if plan is not None else "packed"
    if given and batching is None and planned == "packed":
        log.warning("micro-batches are bucketed because of %s", given)
    return batching or ("bucketed" if given else planned)


def fixed_buckets(
    num_buckets: int, datasets: Sequence[TokenizedDataset], plan: Plan
) -> tuple[int, ...]:
    """Return the buckets of ``--dp-bucket off``: those that plans and simulator call fixed, too.

    Raises
    ------
    ConfigError
        If there is no such set, or the plan cannot take the bucket of the longest sequence.
    """
    longest = max((int(data.lengths.max()) for data in datasets), default=0)
    if longest == 0:
        return ()
    buckets = tuple(static_buckets(num_buckets, longest).tolist())
    if buckets[-1] > plan.max_tokens >= longest:
        raise ConfigError(
            f"--dp-bucket off: the longest sequence ({longest} tokens) is padded to the fixed "
            f"bucket of {buckets[-1]}, but the largest max_tokens of {plan} is {plan.max_tokens}; "
            f"use --dp-bucket on, or plan with fixed buckets"
        )
    return buckets
