"""AdamW with its moments in 8 bits, by bitsandbytes (arXiv 2110.02861).

Moments are quantised by blocks of 256, each with a largest value of its own. Where blocks begin
follows from which rank has which part of the weights, so a run goes on exactly on the same plan
only. Of parts of fewer than 4,096 elements the moments stay in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lobra.tasks.config import TaskConfig
from lobra.tasks.kinds import ADAMW_8BIT
from lobra.trainer.zero import EIGHT_BIT_BLOCK, MASTER, Partition

_PLACES = {"exp_avg": "1", "exp_avg_sq": "2"}  # of each moment in the names of its state


class EightBitPartition(Partition):
    """A partition whose moments are in 8 bits; they are read and set in fp32."""

    @property
    def moments(self) -> dict[str, Tensor]:
        """Return the moments as they count."""
        found = {name: torch.zeros_like(self.master_p) for name in _PLACES}
        for run, state in self._states():
            for name, own_p in found.items():
                own_p[run] = _read(state, _PLACES[name])
        return found

    def set(self, name: str, part: Tensor) -> None:
        """Set a moment, or `MASTER`; what lies beyond the end of ``part`` is padding."""
        if name == MASTER:
            super().set(name, part)
            return
        for run, state in self._states():
            _write(state, _PLACES[name], part[run])

    def set_updates(self, updates: int) -> None:
        """Set how many updates the moments have seen."""
        self.num_updates = updates
        for _, state in self._states():
            state["step"] = updates

    def _keep_moments(self, names: Sequence[str]) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                self.optimizer.init_state(group, param, number, place)  # type: ignore[attr-defined]

    def _states(self) -> Iterator[tuple[slice, Any]]:
        for group, runs in zip(self.optimizer.param_groups, self.runs.values(), strict=True):
            for param, run in zip(group["params"], runs, strict=True):
                yield run, self.optimizer.state[param]


def _read(state: Any, place: str) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    value: Tensor = state[f"state{place}"]
    if value.dtype != torch.uint8:
        return value
    scales, code = state[f"absmax{place}"], state[f"qmap{place}"]
    read: Tensor = dequantize_blockwise(value, absmax=scales, code=code, blocksize=EIGHT_BIT_BLOCK)
    return read


def _write(state: Any, place: str, value: Tensor) -> None:
    own: Tensor = state[f"state{place}"]
    if own.dtype != torch.uint8:
        own.copy_(value)
        return
    quantised, scales = _quantised(value.to(own.device), state[f"qmap{place}"])
    own.copy_(quantised)
    state[f"absmax{place}"].copy_(scales)


def _quantised(value: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and the blocks' scales of what was read from such, to the last bit.

    A block's scale was its largest value. That has the code 1 if it was positive; if it was
    negative the least code, which is less: the scale is larger than what is read then.
    """
    size = value.numel()
    blocks = pad(value, (0, -size % EIGHT_BIT_BLOCK)).view(-1, EIGHT_BIT_BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scales = largest.clone()
    codes = torch.zeros_like(blocks, dtype=torch.int64)
    is_known = torch.zeros_like(largest, dtype=torch.bool)
    middles = (code[1:] + code[:-1]) / 2
    negative = -code.min()
    near = largest / negative if negative > 0 else largest
    up, down = (torch.full_like(near, end) for end in (torch.inf, 0.0))
    for candidate in (largest, near, torch.nextafter(near, up), torch.nextafter(near, down)):
        found = torch.bucketize(torch.where(candidate > 0, blocks / candidate, 0.0), middles)
        is_exact = (code[found] * candidate == blocks).all(dim=1, keepdim=True) & ~is_known
        scales = torch.where(is_exact, candidate, scales)
        codes = torch.where(is_exact, found, codes)
        is_known |= is_exact
    assert is_known.all(), "what was read from blocks has scales"
    return codes.flatten()[:size].to(torch.uint8), scales.flatten()


def eight_bit_problems(
    tasks: Sequence[TaskConfig], precision: str, plan: str, earlier_plan: str | None
) -> list[str]:
    """Return why tasks cannot have their moments in 8 bits (empty: they can, or do not want to).

    ``earlier_plan`` is the plan of the checkpoint that a run goes on from.
    """
    wanting = [task.name for task in tasks if task.optimizer == ADAMW_8BIT]
    if not wanting:
        return []
    problems = []
    where = f"task {wanting[0]}: optimizer: {ADAMW_8BIT}"
    if find_spec("bitsandbytes") is None:
        problems.append(f"{where}: wants bitsandbytes: pip install 'lobra[quantised]'")
    if precision == "fp64":
        problems.append(f"{where}: is not made for fp64: give --precision fp32, or another")
    if earlier_plan is not None and earlier_plan != plan:
        problems.append(
            f"{where}: its moments are in blocks of the plan they were made on, {earlier_plan}: "
            f"the run goes on exactly on that one only, not on {plan}"
        )
    return problems
