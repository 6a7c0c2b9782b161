"""Imported once by the fork server: everything a training rank needs."""

import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.stage_1_and_2  # noqa: E402

import lobra.trainer.worker  # noqa: E402, F401
