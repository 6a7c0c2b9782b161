"""One JSON of what the parts of benchmarks/gpu.sh have found so far.

    python -m benchmarks.gpu_report OUT DEVICE

Reads OUT/parts.tsv (name, exit status, seconds) and each part's NAME.json, writes OUT/gpu.json and
prints a line about the last part, and one about each bar that what it found is held to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic

NOTHING_TO_TEST = 5  # pytest's status
LEFT_OUT = 127  # gpu.sh's
TOO_LATE = (124, 137)  # timeout's


Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """What a figure of a part must be, on a GPU and the job of that name: at least, or at most."""

    part: str
    figure: str
    read: Callable[[Rows], float]
    least: float | None = None
    most: float | None = None

    def judged(self, rows: Rows) -> dict[str, Any]:
        """Return the bar with what was found; None where that was not measured."""
        limits = {"least": self.least, "most": self.most}
        try:
            found = self.read(rows)
        except (LookupError, TypeError, ValueError):
            return {"figure": self.figure, **limits, "found": None, "met": None}
        is_met = (self.least or 0.0) <= found <= (self.most or float("inf"))
        return {"figure": self.figure, **limits, "found": found, "met": is_met}


def _of(column: str, **values: Any) -> Callable[[Rows], float]:
    """Return a reader of a column of the row that has these values."""

    def read(rows: Rows) -> float:
        return float(next(iter(_having(rows, column, **values)))[column])

    return read


def _having(rows: Rows, column: str, **values: Any) -> Rows:
    found = [row for row in rows if column in row and values.items() <= row.items()]
    if not found:
        raise LookupError(column)
    return found


def _over_peft(rows: Rows) -> float:
    """Return our speed over the better PEFT set-up's, at the fewest tasks."""
    speeds = {
        row["side"]: float(row["tokens_per_s"]) for row in _having(rows, "tokens_per_s", tasks=4)
    }
    return speeds["ours"] / max(speeds["peft-switching"], speeds["peft-sorted"])


BARS = (
    Bar("multi_lora", "passes with 4 tasks, share of the packed frozen base",
        _of("compute_share", side="ours", tasks=4), least=0.85),
    Bar("multi_lora", "passes with 16 tasks, share of the packed frozen base",
        _of("compute_share", side="ours", tasks=16), least=0.80),
    Bar("multi_lora", "whole step with 4 tasks, share of the packed frozen base",
        _of("share", side="ours", tasks=4), least=0.80),
    Bar("multi_lora", "tokens/s over the better PEFT set-up's, 4 tasks", _over_peft, least=1.4),
    Bar("activations", "bytes a token and layer under keep",
        _of("kept_bytes", memory="keep"), most=100e3),
    Bar("training", "real tokens/s of lobra train on an H200",
        _of("tokens_per_s", command="train"), least=55_000),
)  # fmt: skip


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return of every part how it ended, what it took and what it found (None: nothing)."""
    parts = {}
    for line in (folder / "parts.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split("\t")
        path = folder / f"{name}.json"
        parts[name] = {
            "ended": how_it_ended(int(status)),
            "seconds": int(seconds),
            "found": json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None,
        }
    return parts


def how_it_ended(status: int) -> str:
    """Return an exit status in words."""
    if status == 0:
        return "ok"
    if status == NOTHING_TO_TEST:
        return "there was nothing to test"
    if status == LEFT_OUT:
        return "left out, as packages are missing"
    return "out of time" if status in TOO_LATE else f"failed with {status}"


def judge(parts: Mapping[str, Any], bars: Sequence[Bar] = BARS) -> Iterator[dict[str, Any]]:
    """Yield the bars of parts that have found something, with what it was."""
    for bar in bars:
        if (found := parts.get(bar.part, {}).get("found")) is not None:
            yield {"part": bar.part, **bar.judged(found["rows"])}


def main() -> int:
    """Write the JSON and say how the last part ended."""
    folder, is_judged = Path(sys.argv[1]), sys.argv[2] == "cuda"
    parts = read_parts(folder)
    bars = list(judge(parts)) if is_judged else []
    write_atomic(folder / "gpu.json", json.dumps({"parts": parts, "bars": bars}, indent=1) + "\n")
    name, last = list(parts.items())[-1]
    print(f"-- {name}: {last['ended']}, {last['seconds']} s")
    for bar in bars:
        if bar["part"] == name:
            verdict = {None: "not measured", True: "met", False: "MISSED"}[bar["met"]]
            limit = (
                f"at least {bar['least']:g}" if bar["most"] is None else f"at most {bar['most']:g}"
            )
            found = "" if bar["found"] is None else f"{bar['found']:.4g}, "
            print(f"   {bar['figure']}: {found}{limit}: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
