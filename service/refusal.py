"""What a request that is not accepted is answered with."""

from __future__ import annotations


class Refusal(Exception):
    """Why a request is not accepted: a status of HTTP and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
