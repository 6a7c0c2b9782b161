"""The memory estimator against the layouts LobRA deployed: 32B and 70B, never used to calibrate it.

LobRA published max_tokens of 7B only. But each layout it deployed must have held the sequences it
was deployed for, and a homogeneous deployment for 16,384 tokens says that layouts of no more GPUs
and less tensor parallelism, which are faster where they fit, did not hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lobra.commands.profile_options import CUDA_MEMORY_SHARE
from lobra.layout.shapes import NAMED_SHAPES
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_memory import Adapters, estimate_memory
from lobra.tasks.target_modules import TARGET_MODULES

STEP, LARGEST = 256, 1 << 20
# (model, tasks trained together, tokens that must fit, layout): Task-Fused and LobRA's layout for
# long sequences hold 16,384 tokens, those of Task-Sequential the data set's longest sequence.
HELD = [
    ("32B", 12, 16384, (8, 1)),
    ("32B", 12, 16384, (8, 2)),
    ("70B", 12, 16384, (16, 1)),
    ("70B", 4, 16384, (16, 1)),
    ("32B", 1, 16384, (8, 1)),
    ("32B", 1, 8192, (4, 1)),
    ("32B", 1, 4096, (2, 2)),
    ("70B", 1, 16384, (16, 1)),
    ("70B", 1, 8192, (8, 1)),
    ("70B", 1, 4096, (4, 2)),
    ("70B", 1, 2048, (2, 4)),
]
# Deployed for short sequences of 12 tasks: at least some must fit.
SOME = [
    ("32B", 12, 256, (1, 6)),
    ("32B", 12, 256, (2, 2)),
    ("32B", 12, 256, (4, 1)),
    ("70B", 12, 256, (2, 4)),
    ("70B", 12, 256, (4, 2)),
    ("70B", 12, 256, (8, 1)),
]
# Passed over for a layout of as many GPUs and more tensor parallelism.
NOT_HELD = [
    ("32B", 12, 16384, (4, 2)),
    ("32B", 12, 16384, (4, 1)),
    ("70B", 12, 16384, (8, 2)),
    ("70B", 12, 16384, (8, 1)),
    ("70B", 1, 16384, (8, 1)),
    ("32B", 1, 16384, (4, 1)),
]


def profiler_deployments(
    *, runtime: str = "hetu", accelerator: str = "A800-80GB"
) -> Iterator[dict[str, Any]]:
    """Compare the memory estimator with what LobRA's deployments tell.

    Parameters
    ----------
    runtime, accelerator
        As `lobra profile memory --estimate` takes them.
    """
    tables = load_tables()
    budget = CUDA_MEMORY_SHARE * tables.accelerator(accelerator).memory_bytes
    for rows, known in ((HELD, "held"), (SOME, "held some"), (NOT_HELD, "did not hold")):
        for model, tasks, tokens, (tp, pp) in rows:
            adapters = Adapters(((16, TARGET_MODULES),) * tasks)
            estimate = estimate_memory(
                NAMED_SHAPES[model], tp, pp, adapters, "bf16", tables.runtime(runtime)
            )
            found = estimate.max_tokens(budget, STEP, LARGEST)
            yield {
                "model": model,
                "tasks": tasks,
                "tokens": tokens,
                "layout": f"<{tp},{pp}>",
                "known": known,
                "estimated tokens": found,
                "agrees": (found >= tokens) == (rows is not NOT_HELD),
            }
