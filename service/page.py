"""The page at `/`: what is served, who trains, what it takes; a tenant sees its own only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lobra.service.deployment import Deployment
from lobra.service.ledger import CheckpointRow, ModelRow
from lobra.service.tally import Tally

REFRESH_S = 5
CURVE = (160, 36)  # pixels
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem .6rem }
th { border-bottom: 1px solid #999 } tr + tr td { border-top: 1px solid #ddd }
.wide { overflow-x: auto } svg { vertical-align: middle } .quiet { color: #666 }
"""


def page(
    deployment: Deployment,
    tally: Tally,
    models: Sequence[ModelRow],
    checkpoints: Sequence[CheckpointRow],
    waiting: dict[str, int],
    on_ranks: frozenset[str],
) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    models, checkpoints
        Those that are shown.
    waiting
        Of each tenant that is shown, its requests without a result.
    on_ranks
        The names of the models that have a slot.
    """
    parts = [
        f"<h1>{escape(deployment.names[0])}</h1>",
        _paragraph(_plan_text(deployment)),
        _paragraph(_pass_text(tally)),
        "<h2>Replicas</h2>",
        _table(("rank", "busy", "memory"), _rank_rows(tally)),
        "<h2>Tenants</h2>",
        _table(
            ("tenant", "requests that wait", "tokens so far"),
            [(name, count, f"{tally.tokens[name]:,}") for name, count in sorted(waiting.items())],
        ),
        "<h2>Models</h2>",
        _table(
            ("model", "tenant", "rank", "where", "loss"),
            [
                (
                    row.id,
                    row.tenant,
                    row.rank,
                    "on the ranks" if row.id in on_ranks else "waits outside",
                    _Raw(_curve(list(tally.losses[row.id]))),
                )
                for row in models
            ],
        ),
        "<h2>Checkpoints</h2>",
        _table(
            ("checkpoint", "updates", "size", "saved", ""),
            [
                (
                    row.path,
                    row.updates,
                    f"{row.size_bytes / 1e6:,.1f} MB",
                    time.strftime("%Y-%m-%d %H:%M", time.gmtime(row.created_at)),
                    _Raw(_link(row)),
                )
                for row in checkpoints
            ],
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{REFRESH_S}">'
        f"<title>{escape(deployment.names[0])}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )


class _Raw(str):
    """HTML that is not escaped."""


def _plan_text(deployment: Deployment) -> str:
    plan = deployment.run.plan
    planner = plan.meta.get("planner")
    why = f", chosen by {planner}" if planner else ""
    step = plan.meta.get("step_time_s")
    predicted = f" for steps of {step:.3g} s" if isinstance(step, (int, float)) else ""
    largest = f"a datum may have up to {plan.max_tokens:,} tokens"
    return f"Plan {plan} on {plan.num_gpus} ranks{why}{predicted}; {largest}."


def _pass_text(tally: Tally) -> str:
    if not tally.passes:
        return "No pass yet."
    text = f"{tally.passes:,} passes of {1000 * tally.pass_s / tally.passes:.0f} ms"
    if tally.predicted_s:
        text += f" (predicted: {1000 * tally.predicted_s / tally.passes:.0f} ms)"
    return f"{text}, {tally.updates:,} updates since the service was started."


def _rank_rows(tally: Tally) -> list[tuple[Any, ...]]:
    return [
        (
            rank,
            f"{busy / max(tally.pass_s, 1e-9):.0%} of the passes' time",
            f"{memory / 1e9:.2f} GB",
        )
        for rank, (busy, memory) in enumerate(zip(tally.busy_s, tally.memory_bytes, strict=True))
    ]


def _curve(losses: Sequence[float]) -> str:
    """Return losses as a line, with the last one's value."""
    if not losses:
        return ""
    width, height = CURVE
    low, high = min(losses), max(losses)
    points = " ".join(
        f"{width * place / max(1, len(losses) - 1):.1f},"
        f"{height - 2 - (height - 4) * (loss - low) / max(high - low, 1e-12):.1f}"
        for place, loss in enumerate(losses)
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="losses">'
        f'<polyline fill="none" stroke="#36c" points="{points}"/></svg> {losses[-1]:.4g}'
    )


def _link(row: CheckpointRow) -> str:
    model = escape(row.model_id, quote=True)
    route = f"/api/v1/training_runs/{model}/checkpoints/{row.kind}/{escape(row.name)}/archive"
    return f'<a href="{route}" download="{escape(row.name)}.tar">PEFT folder</a>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    if not body:
        return '<p class="quiet">None.</p>'
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    return value if isinstance(value, _Raw) else escape(str(value))


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
