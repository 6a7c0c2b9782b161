"""A run's config.yaml: everything the run was made of, and the plans it has had."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import ConfigDict, Field

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.models import Count, FileModel, PositiveInt, Text, load_as
from lobra.common.version import installed_version
from lobra.layout.plan import Plan, PlanEntry, PlanMeta, RankMap
from lobra.profiler.hardware import describe_device, versions
from lobra.tasks.kinds import ADAPTERS, FULL
from lobra.trainer.run_spec import CONFIG_FILE, RunSpec

if TYPE_CHECKING:
    from lobra.trainer.request import TrainRequest

log = logging.getLogger(__name__)


class _Noted(FileModel):
    """What is read again of an object in config.yaml; what else versions note there is ignored."""

    __pydantic_config__ = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class PlanPeriod(_Noted):
    """Where a run ran from a step (0-based) on: a plan, its ranks, a device and a precision."""

    from_step: Count
    plan: Annotated[list[PlanEntry], Field(min_length=1)]
    rank_map: RankMap | None = None
    device: Text | None = None
    precision: Text | None = None

    @classmethod
    def of(cls, run: RunSpec) -> PlanPeriod:
        """Return where a run is to run from the step on that it starts at."""
        plan = [PlanEntry.of(group) for group in run.made_plan.groups]
        step = run.resume_step or 0
        return cls(step, plan, run.world.as_lists(), run.device, run.precision)

    def as_plan(self) -> Plan:
        """Return the plan."""
        return Plan(tuple(entry.group() for entry in self.plan))

    def as_plain(self) -> dict[str, Any]:
        """Return the entry of `plans` in config.yaml."""
        return {**asdict(self), "plan": [entry.as_plain() for entry in self.plan]}


@dataclass(frozen=True)
class RunTask(_Noted):
    """A task of a run: its kind, its steps, and after which of the run's it left, if so."""

    name: Text
    num_steps: PositiveInt | None = None
    left_at: Count | None = None
    adapter: Text = ADAPTERS[0]


@dataclass(frozen=True)
class UsedProfile(_Noted):
    """The time profile that steps are balanced and predicted with."""

    path: str = ""
    digest: str | None = None


@dataclass(frozen=True)
class RunConfig(_Noted):
    """What is read again of a run's config.yaml.

    ``plan`` and what is beside it are of the last plan; ``plans`` are all the run has had, and
    ``resumes`` all steps (0-based) it went on from, which older versions did not note. ``agent`` is
    torchrun's that has launched it (`trainer.agent`).
    """

    versions: dict[str, str]
    tasks: list[RunTask]
    device: Text
    plan: Annotated[list[PlanEntry], Field(min_length=1)]
    rank_map: RankMap | None = None
    precision: Text | None = None
    resumed_at: Count | None = None
    plan_meta: PlanMeta | None = None
    plans: tuple[PlanPeriod, ...] = ()
    resumes: tuple[Count, ...] = ()
    time_profile: UsedProfile = UsedProfile()
    agent: Text | None = None

    @property
    def trains_model(self) -> bool:
        """Whether the run's only task trains the model itself, and no adapter."""
        return any(task.adapter == FULL for task in self.tasks)

    @property
    def known_resumes(self) -> tuple[int, ...]:
        """The steps from which the run went on after it had stopped, ascending."""
        return self.resumes or ((self.resumed_at,) if self.resumed_at else ())

    @property
    def periods(self) -> tuple[PlanPeriod, ...]:
        """The plans the run has had, the last one last."""
        first = self.resumed_at or 0
        last = PlanPeriod(first, self.plan, self.rank_map, self.device, self.precision)
        return self.plans or (last,)


def read_run_config(folder: Path) -> RunConfig:
    """Return what a run's folder says of it.

    Raises
    ------
    ConfigError
        If there is no config.yaml, or it is none of a run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: no {CONFIG_FILE} in it; give the folder of a run")
    return load_as(RunConfig, folder / CONFIG_FILE)


def plan_history(folder: Path, present: PlanPeriod) -> list[PlanPeriod]:
    """Return the plans of a run that starts or goes on, the present one last.

    A plan that stays the same keeps its entry. What is known of earlier ones is in the folder's
    config.yaml.
    """
    earlier: Sequence[PlanPeriod] = ()
    if present.from_step > 0:
        try:
            earlier = read_run_config(folder).periods
        except ConfigError as error:
            log.warning("what plans the run has had so far is not known: %s", error)
    history = [period for period in earlier if period.from_step < present.from_step]
    if history and replace(history[-1], from_step=present.from_step) == present:
        return history
    return [*history, present]


def resume_history(folder: Path, step: int | None) -> list[int]:
    """Return the steps from which a run went on, the present one last; none for a new run."""
    if not step:
        return []
    try:
        earlier = read_run_config(folder).known_resumes
    except ConfigError:  # `plan_history` has warned
        earlier = ()
    return [*(before for before in earlier if before < step), step]


def used_versions(device: str) -> dict[str, str]:
    """Return what decides the bits of a result: the machine ("cpu" or "cuda"), and versions."""
    own = {name: installed_version(name) for name in ("lobra", "deepspeed", "safetensors")}
    return {**own, **versions(), "machine": describe_device(device)["name"]}


def warn_of_other_versions(run: RunSpec) -> None:
    """Warn, in one message, where a run goes on with other software, machine or profile."""
    try:
        earlier = read_run_config(run.output_dir)
    except ConfigError:  # `plan_history` has warned
        return
    now = used_versions(run.device)
    changed = [
        f"{name} {now[name]} (before: {version})"
        for name, version in earlier.versions.items()
        if name in now and now[name] != version
    ]
    profile, digest = earlier.time_profile, run.cost_model.meta.get("digest")
    if profile.digest not in (None, digest):
        changed.append(f"another time profile (before: {profile.path}, digest {profile.digest})")
    if changed:
        log.warning(
            "the run goes on with %s: what is computed is the same but for rounding",
            ", ".join(changed),
        )


def _change_config(folder: Path, what: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Have a function change what a run's config.yaml holds, and write it again.

    That it cannot be read or written is warned of, and no reason to end a run.
    """
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        change(config)
        write_atomic(path, yaml.safe_dump(config, sort_keys=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        log.warning("%s: does not say that %s (%s)", path, what, error)


def note_restart(run: RunSpec) -> RunSpec:
    """Note in config.yaml from where and on which plan a run goes on; return it, as it knows now.

    What it knows is from which step on it has had that plan.
    """
    folder, step = run.output_dir, run.resume_step
    plans = plan_history(folder, PlanPeriod.of(run))
    noted = {
        "resumed_at": step,
        "resumes": resume_history(folder, step),
        "plan": run.made_plan.entries(),
        "plan_meta": _plain(run.made_plan.meta),
        "rank_map": run.world.as_lists(),
        "plans": [period.as_plain() for period in plans],
    }
    _change_config(folder, "the run goes on", lambda config: config.update(noted))
    return replace(run, plan_from=plans[-1].from_step)


def note_tasks(run: RunSpec, left: Mapping[str, int]) -> None:
    """Note in config.yaml which tasks the run has now, and after which step others left."""

    def change(config: dict[str, Any]) -> None:
        known = {entry["name"]: entry for entry in config["tasks"]}
        known |= {entry["name"]: entry for entry in _task_entries(run)}
        for name, step in left.items():
            known[name]["left_at"] = step
        config |= {"tasks": list(known.values()), "last_step": run.last_step}
        config["digests"]["data"] |= _data_digests(run)

    _change_config(run.output_dir, "the tasks have changed", change)


def _task_entries(run: RunSpec) -> list[dict[str, Any]]:
    return [
        {**_plain(asdict(task)), "num_steps": steps}
        for task, steps in zip(run.tasks, run.num_steps, strict=True)
    ]


def _data_digests(run: RunSpec) -> dict[str, str]:
    return {record["name"]: record["data_sha256"] for record in run.task_records}


def _tasks_that_left(run: RunSpec) -> list[dict[str, Any]]:
    """Return the entries of config.yaml of tasks that the run no longer has as it goes on."""
    if run.resume_step is None:
        return []
    try:
        earlier = read_document(run.output_dir / CONFIG_FILE)["tasks"]
    except (ConfigError, KeyError, TypeError):  # `plan_history` has warned
        return []
    present = {task.name for task in run.tasks}
    return [entry for entry in earlier if "left_at" in entry and entry["name"] not in present]


def resolved_config(
    run: RunSpec, request: TrainRequest, gpus_per_node: int | None, plans: Sequence[PlanPeriod]
) -> dict[str, Any]:
    """Return everything the run was made of, as plain values."""
    return {
        "model": request.model,
        "trainer_config": request.trainer_config,
        "strategy_config": request.strategy_config,
        "data_dir": os.fspath(request.data_dir),
        "num_tasks": request.num_tasks,
        "max_seq_length": request.max_seq_length,
        "gpus_per_node": gpus_per_node,
        "time_profile": run.cost_model.meta,
        "model_folder": os.fspath(run.model_folder),
        "precision": run.precision,
        "base_precision": run.base_precision,
        "device": run.device,
        "seed": run.seed,
        "last_step": run.last_step,
        "batching": run.batching,
        "dp_bucket": run.dynamic_buckets,
        "num_buckets": run.num_buckets,
        "buckets": None if run.dynamic_buckets else list(run.buckets),
        "dispatch": run.dispatch_mode,
        "cost_model": request.cost_model,
        "feedback": run.feedback,
        "validate_every": run.validate_every,
        "save_every": run.save_every,
        "keep_checkpoints": run.keep_checkpoints,
        "hang_timeout": run.hang_timeout_s,
        "max_restarts": request.max_restarts,
        "watch_tasks": request.watch_tasks,
        "replan": request.replan,
        "deterministic": run.deterministic,
        "report_to": list(run.report_to),
        "resumed_at": run.resume_step,
        "resumes": resume_history(run.output_dir, run.resume_step),
        "agent": request.agent,
        "data_day": run.data_day,
        "tasks": [*_task_entries(run), *_tasks_that_left(run)],
        "plan": run.made_plan.entries(),
        "plan_meta": _plain(run.made_plan.meta),
        "rank_map": run.world.as_lists(),
        "versions": used_versions(run.device),
        "digests": {
            "base_model": run.fingerprint,
            "data": _data_digests(run),
        },
        "plans": [period.as_plain() for period in plans],
    }


def _plain(value: Any) -> Any:
    """Return value with tuples as lists and paths as text, so that YAML stays plain."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
