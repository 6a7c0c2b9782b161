"""Ranks that compute all tasks at once, as on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from lobra.model.joint_stack import JointStack
from lobra.service.engine_link import serve_rank
from lobra.trainer import engine


def serve_joined(**arguments: Any) -> None:
    """Serve as this rank."""
    engine.build_stage = partial(engine.build_stage, stack_type=JointStack)
    serve_rank(**arguments)
