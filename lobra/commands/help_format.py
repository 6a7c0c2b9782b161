"""How `--help` looks: plain text in two columns, the same on a terminal and in a file."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

MARGIN = 24  # where explanations begin
SELF_EVIDENT = ("False", "()")  # defaults that need no mention


class PlainHelp:
    """Formatter of a command's help."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a list of commands or options."""
        if panel.entries:
            _write(console, f"{str(panel.title).lower()}:")
        for entry in panel.entries:
            _write(console, _entry(entry, min(options.max_width, 100)))

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the line of the command and its required options."""
        _write(console, f"usage: {str(usage).removeprefix('Usage: ').strip()}\n")

    def render_description(self, console: Console, options: ConsoleOptions, text: Any) -> None:
        """Print what the command does."""
        if text:
            _write(console, f"{_plain(text)}\n")


def _entry(entry: HelpEntry, width: int) -> str:
    choices = "|".join(entry.choices or ())
    label = entry.positional_label or " ".join(entry.display_labels)
    if choices or (not entry.positional_label and entry.metavar):
        label += f" {choices or entry.metavar}"
    label = f"  {label}"
    words = [_plain(entry.description)]
    if entry.required:
        words.append("(required)")
    elif entry.default is not None and str(entry.default) not in SELF_EVIDENT:
        words.append(f"(default {entry.default})")
    lines = textwrap.wrap(" ".join(filter(None, words)), width - MARGIN, break_on_hyphens=False)
    if lines and len(label) < MARGIN - 1:
        label, lines = f"{label:<{MARGIN}}{lines[0]}", lines[1:]
    return "\n".join([label, *(" " * MARGIN + line for line in lines)])


def _plain(text: Any) -> str:
    text = getattr(text, "primary_renderable", text)
    return str(getattr(text, "plain", text) or "").rstrip()


def _write(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
