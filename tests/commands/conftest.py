"""The set-up of a run, which tests of the trainer share."""

from tests.trainer.conftest import place, tiny_base

__all__ = ["place", "tiny_base"]
