"""Numbers of things in words."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return so many of a noun whose plural ends with an s: 1 GPU, 2 GPUs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
