"""The report of experiments and simulations: tables, pictures and one self-contained page."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lobra.common.documents import parsing
from lobra.common.files import write_atomic
from lobra.report.experiment_plots import plot_tables
from lobra.report.experiment_tables import TITLES, Tables, read_experiment

FOLDER, PAGE = "report", "report.html"
CAPTIONS = {
    "gpu_seconds": "Fewer is better. All methods were given the same sampled steps. Baselines are "
    "dealt the sequences of each bucket evenly; with our dispatch they are balanced too; with 16 "
    "dynamic buckets as well they lack heterogeneous replicas alone. All GPUs there are count.",
    "ablation": "One thing is changed at a time: the number of buckets, dispatch by length, "
    "balanced dispatch, each step's own (dynamic) buckets.",
    "timeline": "Each bar is a micro-batch, the costliest first: sequences times the length they "
    "are padded to; the darker, the longer.",
    "buckets": "Dynamic buckets; the plan is the one made for 16.",
    "scale_gpus": "Open markers: published values. All GPUs that there are count.",
    "scale_tasks": "Open markers: published values.",
    "planning_time": "Open markers: published values. A search that was stopped took its limit; "
    "see the table for its bound.",
    "predicted_measured": "Measured: published, on 16 A100-40GB.",
    "lengths": "Squares: published; dots: the lengths these tables were made with.",
}
SHOWN = {  # the columns of the terminal's tables; the page and the CSVs have all
    "methods": (
        "method",
        "plan",
        "step_time_s",
        "gpu_seconds",
        "less_than_sequential",
        "less_than_fused",
    ),
    "ablation": (
        *("plan_of", "rung", "buckets", "step_time_s", "gpu_seconds"),
        *("less_than_fused", "less_than_fused_16_fixed"),
    ),
    "buckets": ("plan_of", "buckets", "step_time_s", "padding"),
    "scale_gpus": ("gpus", "method", "plan", "gpu_seconds", "relative", "published"),
    "scale_tasks": ("tasks", "method", "plan", "gpu_seconds", "relative", "published"),
    "planning_time": (
        "num_gpus",
        "tasks",
        "pattern",
        "seconds",
        "stopped",
        "published_s",
        "gpus_used",
        "step_time_s",
        "published_plan_step_s",
    ),
    "homogeneous_steps": ("plan", "seq_len", "measured_lobra_s", "predicted_s", "difference"),
}
NUMBER_WIDTH = 10  # of a column in the terminal: headings wrap, names have the room
SHARES = ("less_than", "padding", "idle", "gap", "difference", "error")


def report_experiment(folder: Path) -> list[Path]:
    """Print an experiment's tables; write pictures, tables and the page to ``folder/report``.

    Returns
    -------
    list[Path]
        The files written.

    Raises
    ------
    ConfigError
        If a file of the folder is not readable.
    """
    out = folder / FOLDER
    console = Console()
    with parsing(folder):
        about, tables = read_experiment(folder)
        console.print(_headline(about))
        for name, columns in SHOWN.items():
            if tables.get(name):
                console.print(_terminal(TITLES[name], tables[name], columns))
        pictures = plot_tables(tables, out)
    copies = []
    for name, rows in tables.items():
        copies.append(out / f"{name}.csv")
        write_atomic(copies[-1], _csv_text(rows))
    page = out / PAGE
    write_atomic(page, _page(about, tables, pictures))
    return [page, *pictures, *copies]


def _headline(about: Mapping[str, Any]) -> str:
    model, gpus = about.get("model"), about.get("num_gpus")
    what = f"{model} on {gpus} GPUs, " if model else ""
    kind = "measured" if about.get("kind") == "measured" else "simulated, no GPU was used"
    inputs = about.get("inputs", {}).get("main", {})
    sources = "; ".join(str(inputs[key]) for key in ("profile", "lengths") if key in inputs)
    state = "NOT FINISHED, more tables will come: " if about.get("complete") is False else ""
    sources = f": {sources}" if sources else ""
    return f"{state}{what}{about.get('steps')} steps ({kind}){sources}"


def _terminal(title: str, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Table:
    table = Table(title=title)
    present = [name for name in columns if any(row.get(name) for row in rows)]
    for name in present:
        if _is_number(rows, name):
            table.add_column(_heading(name), justify="right", max_width=NUMBER_WIDTH)
        else:
            table.add_column(_heading(name), overflow="fold")
    for row in rows:
        table.add_row(*(shown(name, row.get(name, "")) for name in present))
    return table


def shown(column: str, text: str) -> str:
    """Return a value for a person: shares in per cent, numbers with four digits."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return {"True": "yes", "False": "no"}.get(text, text or "")
    is_share = any(column.startswith(word) or column.endswith(word) for word in SHARES)
    if is_share or "less_than" in column:
        return f"{round(100 * number, 1) + 0.0:.1f} %"  # no -0.0
    if number == int(number) and "." not in text:
        return f"{int(number):,}"
    return f"{number:,.1f}" if abs(number) >= 1000 else f"{number:.4g}"


def _heading(column: str) -> str:
    words = column.replace("less_than_", "saved against ").replace("gpu_seconds", "GPU-s")
    words = words.replace("_balanced", ", our dispatch")
    words = words.replace("_dynamic", ", our dispatch, dynamic buckets")
    words = words.replace("fused_16_fixed", "fused, 16 fixed buckets")
    words = words.replace("num_gpus", "GPUs").replace("gpus", "GPUs")
    words = words.replace("published_s", "published (s)").replace("d_lobra_s", "d by LobRA (s)")
    if words.endswith("_s"):
        words = f"{words[:-2]} (s)"
    if words.endswith("_ms"):
        words = f"{words[:-3]} (ms)"
    return words.replace("_", " ")


def _is_number(rows: Sequence[Mapping[str, str]], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column)]
    return bool(values) and all(_numeric(value) for value in values)


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "over 3600"
    return True


def _csv_text(rows: Sequence[Mapping[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #111; background: #fff; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption, .about { color: #444; }
"""


def _page(about: Mapping[str, Any], tables: Tables, pictures: Sequence[Path]) -> str:
    model = about.get("model")
    title = f"Experiments with the {model} model" if model else "Simulation"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p class='about'>{html.escape(_headline(about))}</p>",
    ]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        caption = CAPTIONS.get(path.stem, "")
        alternative = html.escape(f"{path.stem.replace('_', ' ')}: {caption}", quote=True)
        parts.append(f"<figure><img alt='{alternative}' src='data:image/png;base64,{data}'>")
        parts.append(f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    for name, rows in tables.items():
        if name != "timeline":
            parts.append(f"<h2>{html.escape(TITLES[name])}</h2>{_html_table(rows)}")
    details = html.escape(json.dumps(about, indent=2))
    parts.append(f"<h2>Made from</h2><pre>{details}</pre></body></html>\n")
    return "".join(parts)


def _intervals(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row with every interval written beside its value, in the same cell."""
    joined = {}
    for name, value in row.items():
        bounds = [_end(name, end) for end in ("low", "high")]
        if value and all(row.get(bound) for bound in bounds):
            value = f"{shown(name, value)} [{', '.join(shown(b, row[b]) for b in bounds)}]"
        if not any(name == _end(other, end) for other in row for end in ("low", "high")):
            joined[name] = value
    return joined


def _end(column: str, end: str) -> str:
    """Return the column of an interval's end: ``step_time_low_s`` of ``step_time_s``."""
    if column.endswith("_time_s"):
        return f"{column[:-2]}_{end}_s"
    return f"{column}_{end}"


def _html_table(rows: Sequence[Mapping[str, str]]) -> str:
    rows = [_intervals(row) for row in rows]
    columns = [name for name in rows[0] if any(row.get(name) for row in rows)]
    head = "".join(f"<th>{html.escape(_heading(name))}</th>" for name in columns)
    numbers = {name for name in columns if _is_number(rows, name)}
    body = []
    for row in rows:
        cells = []
        for name in columns:
            kind = " class='number'" if name in numbers else ""
            cells.append(f"<td{kind}>{html.escape(shown(name, row.get(name, '')))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(body)}</table></div>"
