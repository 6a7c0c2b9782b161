"""The page at `/`: what is served, who trains, what it takes; a tenant sees its own only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from lobra.layout.plan import Plan
from lobra.service.admission import size_text
from lobra.service.charts import bar, lines
from lobra.service.deployment import Deployment
from lobra.service.tables import CheckpointRow, ModelRow
from lobra.service.tally import Activity
from lobra.service.tenants import Tenant

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class TenantLine:
    """What a tenant uses.

    Attributes
    ----------
    tenant
        Who it is, and what it may use.
    waiting, models, slots
        Its requests without a result, its open models, and those of them with a slot.
    tokens
        That were computed since the service was started.
    stored_bytes
        What it has on disk.
    """

    tenant: Tenant
    waiting: int
    models: int
    slots: int
    tokens: int
    stored_bytes: int


@dataclass(frozen=True)
class ModelLine:
    """An open model.

    Attributes
    ----------
    row
        What the ledger has of it.
    place
        Where it is: "on the ranks" and the like.
    waiting
        Its requests without a result.
    losses
        Mean losses of its updates.
    """

    row: ModelRow
    place: str
    waiting: int
    losses: Sequence[float]


@dataclass(frozen=True)
class View:
    """What one who asks for the page is shown.

    Attributes
    ----------
    tenants, models, checkpoints
        Those it may see.
    activity
        What the ranks have done; None: it may not see that.
    missing_ranks
        Why nothing is computed at present, in a sentence; None: it is.
    whole_plan
        The plan that was deployed before hosts were lost; None: none are.
    """

    tenants: Sequence[TenantLine]
    models: Sequence[ModelLine]
    checkpoints: Sequence[CheckpointRow]
    activity: Activity | None
    missing_ranks: str | None
    whole_plan: Plan | None


class _Html(str):
    """HTML that is not escaped."""


def page(deployment: Deployment, view: View) -> str:
    """Return the page; its script puts new `sections` in the place of those it has."""
    name = escape(deployment.names[0])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<noscript><meta http-equiv="refresh" content="10"></noscript>'
        f"<title>{name}</title><style>{STYLE}</style></head>"
        f'<body><h1>{name}</h1><p id="stale" hidden>The service does not answer.</p>'
        f"<main>{sections(deployment, view)}</main><script>{SCRIPT}</script></body></html>"
    )


def sections(deployment: Deployment, view: View) -> str:
    """Return what changes on the page."""
    parts = []
    if view.missing_ranks is not None:
        why = f"Requests wait until the ranks are there: {view.missing_ranks}."
        parts.append(_paragraph(why, "missing"))
    parts.append("<h2>Plan</h2>")
    if view.whole_plan is not None:
        lost = f"Hosts are lost: of {view.whole_plan} there is what the others have room for."
        parts.append(_paragraph(lost, "missing"))
    parts += _plan(deployment)
    if view.activity is not None:
        parts += ["<h2>Passes</h2>", *_passes(view.activity)]
        parts += ["<h2>Replicas</h2>", _replicas(deployment, view.activity)]
    parts += ["<h2>Tenants</h2>", _tenants(view.tenants)]
    parts += ["<h2>Models</h2>", _models(view.models)]
    parts += ["<h2>Checkpoints</h2>", _checkpoints(view.checkpoints)]
    return "".join(parts)


# -- the plan and the ranks -----------------------------------------------------------------------


def _plan(deployment: Deployment) -> list[str]:
    plan, admission = deployment.run.plan, deployment.admission
    rows = [
        (
            group.layout,
            group.replicas,
            f"{group.max_tokens:,}",
            size_text(own.parts.weight_bytes),
            size_text(admission.budget_bytes),
        )
        for group, own in zip(plan.groups, admission.groups, strict=True)
    ]
    heads = ("layout", "replicas", "tokens of a micro-batch", "weights of a rank", "memory it has")
    size = (deployment.max_rank, tuple(deployment.shape.linear_sizes()))
    held = admission.most_slots(size, deployment.max_slots)
    room = (
        f"A datum may have up to {plan.max_tokens:,} tokens. Of {deployment.max_slots} slots, "
        f"memory holds {held} with adapters of rank {deployment.max_rank}."
    )
    return [_paragraph(_why(plan.meta)), _table(heads, rows), _paragraph(room)]


def _why(meta: Mapping[str, Any]) -> str:
    """Return why the plan is what it is, as far as its file says."""
    if "planner" not in meta:
        return "The plan's file does not say how it was chosen."
    text = f"Chosen by {meta['planner']}"
    step_s, bound_s = meta.get("step_time_s"), meta.get("lower_bound_s")
    if step_s:
        text += f" for steps of {step_s:.3g} s"
        if bound_s:
            text += f", of which no plan takes less than {bound_s:.3g} s"
    same = (meta.get("homogeneous") or {}).get("step_time_s")
    if step_s and same:
        text += f"; replicas all alike would take {same / step_s:.2f} times as long"
    return f"{text}."


def _passes(activity: Activity) -> list[str]:
    if not activity.passes:
        return [_paragraph("None yet.", "quiet")]
    recent = activity.recent
    measured = [record.pass_s for record in recent]
    predicted = [record.predicted_s for record in recent]
    known = [value for value in predicted if value is not None]
    drawn: dict[str, Sequence[float | None]] = {"measured": measured, "predicted": predicted}
    label = "times of the last passes, measured and predicted"
    text = f"{activity.passes:,} passes and {activity.updates:,} updates since the start."
    means = f"The last {len(recent)}: measured {1000 * fmean(measured):.0f} ms on average"
    means += f", predicted {1000 * fmean(known):.0f} ms" if known else ", no time profile"
    longest = max([*measured, *known])
    return [
        _paragraph(f"{text} {means}."),
        f'<figure class="wide">{lines(drawn, label, width=600, height=120, low=0.0)}'
        f'<figcaption><span class="measured">measured</span> '
        f'<span class="predicted">predicted</span> <small>the upper edge is '
        f"{1000 * longest:.0f} ms</small></figcaption></figure>",
    ]


def _replicas(deployment: Deployment, activity: Activity) -> str:
    """Return a line per replica: of its ranks those that are busiest and have most in memory."""
    world = deployment.run.world
    recent = [record for record in activity.recent if len(record.busy_s) == world.num_ranks]
    if not recent:
        return _paragraph("None has computed anything yet.", "quiet")
    pass_s = sum(record.pass_s for record in recent)
    budget_bytes = deployment.admission.budget_bytes
    rows = []
    for replica in deployment.run.plan.replicas:
        ranks = world.ranks(replica.index)
        busy_s = max(sum(record.busy_s[rank] for record in recent) for rank in ranks)
        memory_bytes = max(recent[-1].memory_bytes[rank] for rank in ranks)
        share = busy_s / max(pass_s, 1e-9)
        memory_text = f"{size_text(memory_bytes)} of {size_text(budget_bytes)}"
        rows.append(
            (
                f"{replica.index} {replica.layout}",
                ", ".join(map(str, ranks)),
                _Html(bar(share, f"busy {share:.0%}, idle {max(0.0, 1 - share):.0%}")),
                _Html(bar(memory_bytes / budget_bytes, memory_text)),
            )
        )
    return _table(("replica", "ranks", f"time of the last {len(recent)} passes", "memory"), rows)


# -- who trains -----------------------------------------------------------------------------------


def _tenants(tenants: Sequence[TenantLine]) -> str:
    rows = []
    for line in tenants:
        own = line.tenant
        rows.append(
            (
                own.name,
                f"{line.waiting:,}",
                f"{line.tokens:,}" + _of(own.tokens_per_minute, " (at most {:,} a minute)"),
                f"{line.models} of {own.max_models}",
                f"{line.slots}" + _of(own.slots, " of {}"),
                size_text(line.stored_bytes)
                + _of(own.stored_bytes and size_text(own.stored_bytes), " of {}"),
            )
        )
    heads = ("tenant", "waiting requests", "tokens computed", "open models", "slots", "stored")
    return _table(heads, rows)


def _of(quota: int | str | None, text: str) -> str:
    return "" if quota is None else text.format(quota)


def _models(models: Sequence[ModelLine]) -> str:
    rows = [
        (
            _Html(f"<code>{escape(line.row.id)}</code>"),
            line.row.tenant,
            line.row.rank,
            line.place,
            f"{line.waiting:,}",
            _Html(_curve(line.losses)),
        )
        for line in models
    ]
    return _table(("model", "tenant", "rank", "where", "waiting requests", "loss"), rows)


def _curve(losses: Sequence[float]) -> str:
    """Return a model's losses as a line, with the last one's value."""
    if not losses:
        return "<small>no update yet</small>"
    label = f"mean loss of each update, from {losses[0]:.4g} to {losses[-1]:.4g}"
    drawn = lines({"measured": losses}, label, width=160, height=36, low=min(losses))
    return f'<figure class="curve">{drawn}</figure> <small>{losses[-1]:.4g}</small>'


def _checkpoints(checkpoints: Sequence[CheckpointRow]) -> str:
    rows = [
        (
            _Html(f"<code>{escape(row.path)}</code>"),
            row.updates,
            size_text(row.size_bytes),
            _date(row.created_at),
            "" if row.expires_at is None else _date(row.expires_at),
            _Html(_link(row)),
        )
        for row in checkpoints
    ]
    return _table(("checkpoint", "updates", "size", "saved", "kept until", "fetch"), rows)


def _link(row: CheckpointRow) -> str:
    model = escape(row.model_id, quote=True)
    route = f"api/v1/training_runs/{model}/checkpoints/{row.kind}/{escape(row.name)}/archive"
    return f'<a href="{route}" download="{escape(row.name)}.tar">PEFT folder</a>'


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


# -- HTML -----------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; on a phone every row is a list of its cells with their heads."""
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-head="{escape(head)}"><div>{_cell(value)}</div></td>'
            for head, value in zip(heads, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    if not body:
        return _paragraph("None.", "quiet")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    return value if isinstance(value, _Html) else escape(str(value))


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"
