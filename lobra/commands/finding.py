"""What `lobra doctor` found: one line of its report."""

from __future__ import annotations

from dataclasses import dataclass

OK, LACKS, NOTE = "ok", "lacks", "note"


@dataclass(frozen=True)
class Finding:
    """One line of the report: `status` is OK, LACKS (something will not work) or NOTE."""

    status: str
    subject: str
    text: str
