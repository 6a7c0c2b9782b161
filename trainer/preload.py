"""Imported once by the fork server: everything a training rank needs."""

import contextlib

import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.stage_1_and_2  # noqa: E402

# ZeRO asks whether an optimiser is this one, and thereby imports torch's compiler: seconds of every
# rank's start, unless it is here already.
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer

import lobra.trainer.rank  # noqa: E402, F401
