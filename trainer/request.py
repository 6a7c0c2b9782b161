"""What a run is asked for: the options of `lobra train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lobra.common.options import (
    AWAIT_HOSTS_S,
    NOT_AN_OPTION,
    AwaitHosts,
    DataDir,
    Device,
    Int,
    ModelName,
    NonNegativeInt,
    NumBuckets,
    NumGpus,
    NumTasks,
    NumTokens,
    PlanName,
    PositiveInt,
    PositiveNumber,
    Seed,
    Switch,
    TaskSetName,
    TimeProfile,
    as_options,
)
from lobra.layout.base_precision import BasePrecision
from lobra.layout.memory_policy import MemoryPolicy
from lobra.layout.sequences import Batching
from lobra.profiler.cost_model import Kind

#: None: a new run. Empty: the last checkpoint.
ResumeStep = Annotated[tuple[Int, ...] | None, Parameter(consume_multiple=(0, 1), metavar="[STEP]")]


@as_options
@dataclass(frozen=True)
class TrainRequest:
    """What is trained on what, and how: the options of `lobra train`.

    Parameters
    ----------
    output_dir
        The run's folder.
    num_gpus
        Refuse a plan with more ranks.
    max_steps
        End after N steps even if tasks want more.
    max_seq_length
        Cut every task's context_length to N.
    precision
        By default fp32 on CPU, bf16 on GPU; fp64, everything included, is for proofs: slow.
    batching
        Micro-batches of whole sequences end to end, or of sequences padded to buckets; by default
        bucketed where --dp-bucket or --dispatch is given, else what the plan says, else packed.
    dp_bucket
        Bucketed: choose the buckets of every step anew; by default DP_BUCKET, else on.
    dispatch
        Bucketed: balance all replicas, or go by length; by default EXPR_DATA_DISPATCH, else
        balance.
    confine
        Refuse tasks whose dataset_name or resume_from lies outside of this folder (links followed),
        and leave values out of messages on their data.
    skip_bad_tasks
        Train the other tasks where some have mistakes.
    feedback
        Let measured replica times correct the dispatcher; by default on for GPUs, off on CPU, where
        a run is then reproducible bit for bit.
    validate_every
        Steps between validation losses; by default 10 if a task validates or may stop early.
    save_every
        Checkpoint every N steps; 0: at the end only; by default every 15 minutes, or less often
        where that would take more than a twentieth of the time.
    keep_checkpoints
        Checkpoints to keep, the last ones.
    resume
        Go on from a checkpoint of --output-dir (by default the last), on any plan.
    cost_model
        Which fit of the time profile.
    revive
        With --resume: let this stopped task go on (give it once per task).
    report_to
        Where curves are shown: some of tensorboard, wandb and mlflow, with commas between; or none.
    torch_profiler
        Steps to write torch's profiler traces of, such as 3-5 or 3,7.
    hang_timeout
        End the run when no rank has moved for S seconds in a step; by default 600, or 20 times the
        longest step.
    max_restarts
        Start again from the newest checkpoint, at most N times, when a rank dies or stands still or
        a file system fails.
    await_hosts
        With --host-file and --max-restarts: wait S seconds for a host that is lost; then go on
        without it, where spare slots or --replan auto allow that.
    watch_tasks
        Look at the task file between steps: tasks that are added to it join the run, those that are
        taken out of it leave.
    replan
        Plan anew when other tasks take part in steps than before, or GPUs are lost, and go on on
        that plan when it pays.
    deterministic
        Use algorithms only that give the same bits every time, on GPUs too; slower there.
    memory_budget
        Of a model that is trained whole: refuse it where a rank is predicted to take more; by
        default a GPU's memory.
    gpus_per_node
        By default what the launcher started on each host, else the GPUs of this machine.
    found_nodes
        How many ranks a launcher has started on each node, in the order of the ranks.
    launched_world
        Ranks a launcher has started, None without one.
    agent
        torchrun's that has started them (`trainer.agent`), None without one.
    mistakes
        What is wrong besides, to be reported with all else.
    """

    model: ModelName
    trainer_config: TaskSetName
    strategy_config: PlanName
    output_dir: Path
    data_dir: DataDir = Path("data")
    num_gpus: NumGpus | None = None
    num_tasks: NumTasks = None
    max_steps: PositiveInt | None = None
    max_seq_length: NumTokens | None = None
    precision: Literal["fp32", "bf16", "fp64"] | None = None
    base_precision: BasePrecision | None = None
    device: Device = "auto"
    batching: Batching | None = None
    dp_bucket: Switch | None = None
    num_buckets: NumBuckets = 16
    dispatch: Literal["balance", "group"] | None = None
    seed: Seed = 0
    memory: MemoryPolicy | None = None
    confine: Path | None = None
    skip_bad_tasks: bool = False
    feedback: Switch | None = None
    validate_every: NonNegativeInt | None = None
    save_every: NonNegativeInt | None = None
    keep_checkpoints: Annotated[
        PositiveInt, Parameter(name=("--keep-checkpoints", "--keep-last"))
    ] = 3
    resume: ResumeStep = None
    time_profile: TimeProfile = None
    cost_model: Kind = "fitted"
    revive: tuple[str, ...] = ()
    report_to: Annotated[str, Parameter(metavar="NAMES")] = "tensorboard"
    torch_profiler: Annotated[str | None, Parameter(metavar="STEPS")] = None
    hang_timeout: Annotated[PositiveNumber | None, Parameter(metavar="S")] = None
    max_restarts: NonNegativeInt = 0
    await_hosts: AwaitHosts = AWAIT_HOSTS_S
    watch_tasks: bool = False
    replan: Literal["auto", "off"] = "off"
    deterministic: bool = False
    memory_budget: Annotated[str | None, Parameter(metavar="SIZE")] = None
    gpus_per_node: PositiveInt | None = None
    found_nodes: Annotated[tuple[int, ...] | None, NOT_AN_OPTION] = None
    launched_world: Annotated[int | None, NOT_AN_OPTION] = None
    agent: Annotated[str | None, NOT_AN_OPTION] = None
    mistakes: Annotated[tuple[str, ...], NOT_AN_OPTION] = ()

    @property
    def is_resumed(self) -> bool:
        """Whether a run goes on from a checkpoint."""
        return self.resume is not None

    @property
    def resume_step(self) -> int | None:
        """The step to go on from, None for that of the last checkpoint."""
        return self.resume[0] if self.resume else None

    @property
    def contradictions(self) -> list[str]:
        """What is wrong with options beside each other."""
        problems = []
        if self.revive and not self.is_resumed:
            problems.append("--revive: only a run that goes on (--resume) has stopped tasks")
        if self.deterministic and self.feedback == "on":
            problems.append(
                "--deterministic and --feedback on: timings would decide which micro-batch a "
                "sequence is in; leave one out"
            )
        if self.watch_tasks and self.num_tasks is not None:
            problems.append(
                "--watch-tasks and --num-tasks: all tasks of the file would join; leave one out"
            )
        return problems
