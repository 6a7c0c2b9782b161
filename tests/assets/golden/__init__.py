"""Golden adapters, and what they were trained from (see make.py)."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
