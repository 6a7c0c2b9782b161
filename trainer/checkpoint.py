"""Checkpoints: canonical (they know no layout), atomic, the last few kept.

`checkpoints/step_<n>/` holds the state after n steps:

- `adapters/<task>/`: the adapter in PEFT's format, loadable as it is;
- `best/<task>/`: the same of the lowest validation loss so far, of tasks that may stop early;
- `moments/<task>.safetensors`: its optimiser's moments, `<moment>/<PEFT's name>`;
- of a model that is trained whole `adapters/<task>/` is a model folder with the weights as the
  optimiser has them, and `moments/<task>/<moment>/` has files of the same tensors;
- `state.json`: steps, every task's progress by its name, what the data was, the replicas' speed
  factors, and the digests of all files (`trainer.seal`).

Sampling and dropout are pure functions of a task's own steps, so there is no random state to keep.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lobra.common.documents import check_regular, read_document
from lobra.common.errors import ConfigError, Problems
from lobra.common.files import remove_folder, write_atomic
from lobra.common.models import Count, FileModel, OneOf, Positive, read_as
from lobra.layout.sequences import BATCHINGS
from lobra.model.adapter import AdapterSpec
from lobra.model.pissa import trained_shape
from lobra.model.vera import PROJECTIONS
from lobra.tasks.kinds import FULL
from lobra.trainer.adapters import CONFIG_FILE, WEIGHTS_FILE, save_adapter, save_moments
from lobra.trainer.checkpoint_folder import FOLDER, STATE_FILE, list_checkpoints, step_folder
from lobra.trainer.folder_writer import FolderWriter
from lobra.trainer.optimizer import AdapterOptimizer
from lobra.trainer.rank0_folder import Rank0Folder
from lobra.trainer.seal import Seal, broken_by, not_finite, seal_of
from lobra.trainer.task_progress import TaskProgress
from lobra.trainer.task_requests import TaskChange
from lobra.trainer.zero import moment_names

log = logging.getLogger(__name__)

BEST_FOLDER = "best"  # in a checkpoint
FORMAT = 3
SEALED_FROM = 3  # the first format with digests


def _is_day(text: str) -> str:
    date.fromisoformat(text)
    return text


@dataclass(frozen=True)
class CheckpointState(FileModel):
    """The part of a checkpoint that is not tensors.

    `base_model` is the base model's fingerprint (`model.fingerprint`).
    `data_day` is the date that chat templates with a date were told (ISO; None: that of the day).
    `last_metrics` is the line of the step before it in metrics.jsonl, which is written later: a
    run that is killed in between gets it back from here. `changes` are those of the run's tasks so
    far; the tasks are those that they left. `precision` is None in checkpoints of
    versions that did not note it; those without `batching` are of versions that had no other. A
    base without `base_precision` was not quantised.
    """

    step: Count
    seed: Count
    tasks: list[dict[str, Any]]
    progress: dict[str, TaskProgress]
    speed_factors: list[Positive]
    speed_counts: list[Count]
    plan: str
    base_model: str
    last_metrics: dict[str, Any] | None = None
    data_day: Annotated[str, AfterValidator(_is_day)] | None = None
    precision: str | None = None
    base_precision: str | None = None
    batching: Annotated[str, OneOf(BATCHINGS)] = "bucketed"
    changes: list[TaskChange] = field(default_factory=list)


def drop_later(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`: a run that goes on from there makes them anew.

    Each vanishes at once, the last first: what is left, if this is interrupted, can be resumed.
    """
    for later in reversed(list_checkpoints(run)):
        if later > step:
            remove_folder(step_folder(run, later))


class CheckpointWriter(FolderWriter):
    """Writes one checkpoint task by task into a hidden folder, then makes it visible."""

    def __init__(self, run: Path, step: int, need_bytes: int | None = None) -> None:
        """Begin the checkpoint after `step` steps, which takes so much room, if that is known."""
        self.run = run
        super().__init__(step_folder(run, step), "or lower --keep-checkpoints", need_bytes)

    def drafts(self) -> list[Path]:
        """Return the hidden folders of all checkpoints."""
        return [*self.target.parent.glob(".step_*.partial")]

    def add_task(
        self,
        spec: AdapterSpec,
        weights: dict[str, Tensor],
        moments: dict[str, dict[str, Tensor]],
        base_model: str,
    ) -> None:
        """Write one task's adapter and moments (PEFT's names)."""

        def write(draft: Path) -> None:
            save_adapter(draft / "adapters" / spec.name, spec, weights, base_model)
            (draft / "moments").mkdir(exist_ok=True)
            save_moments(draft / "moments" / f"{spec.name}.safetensors", moments)

        self.add(write)

    def add_best(self, spec: AdapterSpec, weights: dict[str, Tensor], base_model: str) -> None:
        """Write the best adapter that a task has had so far (PEFT's names)."""

        self.add(
            lambda draft: save_adapter(draft / BEST_FOLDER / spec.name, spec, weights, base_model)
        )

    def finish(self, state: CheckpointState, num_kept: int) -> None:
        """Make the checkpoint visible, then remove all but the last `num_kept` (at least one).

        Raises
        ------
        StorageError
            The checkpoint could not be written; nothing is left of it, and no other was removed.
        """
        progress = {name: own.as_json() for name, own in state.progress.items()}
        changes = [asdict(change) for change in state.changes]
        content = {"format": FORMAT, **state.__dict__, "progress": progress, "changes": changes}

        def write(draft: Path) -> None:
            content["seal"] = asdict(seal_of(draft, content))
            write_atomic(draft / STATE_FILE, json.dumps(content, indent=1) + "\n")

        self.add(write)
        self.show()
        for old in list_checkpoints(self.run)[:-num_kept]:
            remove_folder(step_folder(self.run, old))


class _Broken(Exception):
    """Why a checkpoint cannot be resumed from, in words."""


def _read(folder: Path, *, whole: bool) -> CheckpointState:
    """Return a checkpoint's state after checking that all its files fit it.

    Parameters
    ----------
    folder
        The checkpoint.
    whole
        Whether every file is read and compared with its digest; else, of tensors, only the headers.

    Raises
    ------
    _Broken
        Something is missing, damaged or does not fit the rest.
    """
    problems = Problems()
    seal = None
    try:
        content = read_document(folder / STATE_FILE)
        as_written = dict(content) if isinstance(content, dict) else {}
        written = content.pop("format", None) if isinstance(content, dict) else None
        if written is not None and written not in range(1, FORMAT + 1):
            raise _Broken(
                f"{STATE_FILE} is of format {written}, this version reads 1 to {FORMAT}: go on "
                f"with the version that wrote it (config.yaml names it), or begin a new run whose "
                f"tasks start from its adapters (resume_from)"
            )
        if written == 1:
            content["progress"] = _progress_of_format_1(content)
        if written is not None and written >= SEALED_FROM:
            seal = read_as(Seal, as_written.pop("seal", None), problems)
            content.pop("seal", None)
        state = read_as(CheckpointState, content, problems)
        problems.raise_if_any()
        assert state is not None
        names = [record["name"] for record in state.tasks]
        if set(names) != state.progress.keys():
            raise _Broken(f"{STATE_FILE} tells the progress of other tasks than its own")
    except ConfigError as error:
        raise _Broken(f"{STATE_FILE} is not usable ({'; '.join(error.problems)})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Broken(f"{STATE_FILE} is not usable ({error!r})") from error
    for record in state.tasks:
        name = record["name"]
        kinds = moment_names(record.get("optimizer", "adamw"), record.get("momentum", 0.0))
        if record.get("adapter") == FULL:
            _check_model(folder, name, kinds)
            continue
        if not (folder / "adapters" / name / CONFIG_FILE).is_file():
            raise _Broken(f"adapters/{name}/{CONFIG_FILE} is missing")
        weights = _tensors(folder, f"adapters/{name}/{WEIGHTS_FILE}")
        for name_of_frozen in PROJECTIONS:
            weights.pop(name_of_frozen, None)
        if record.get("adapter") == "pissa":
            weights = {key: trained_shape(key, size) for key, size in weights.items()}
        moments = _tensors(folder, f"moments/{name}.safetensors")
        if moments != {f"{kind}/{key}": size for kind in kinds for key, size in weights.items()}:
            raise _Broken(f"moments/{name}.safetensors does not fit the task's adapter")
        if state.progress[name].lowest_step is not None:
            best = f"{BEST_FOLDER}/{name}/{WEIGHTS_FILE}"
            if _tensors(folder, best) != weights:
                raise _Broken(f"{best} does not fit the task's adapter")
    if whole:
        _check_values(folder, seal, as_written)
    return state


def _check_model(folder: Path, name: str, kinds: Sequence[str]) -> None:
    """Check that a model that is trained whole has moments of all its tensors.

    Raises
    ------
    _Broken
        They are not there, damaged or do not fit.
    """
    weights = _tensors_below(folder, f"adapters/{name}")
    if not weights:
        raise _Broken(f"adapters/{name} has no weights")
    for kind in kinds:
        if _tensors_below(folder, f"moments/{name}/{kind}") != weights:
            raise _Broken(f"moments/{name}/{kind} does not fit the task's model")


def _tensors_below(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    files = sorted((folder / name).glob("*.safetensors"))
    return {
        key: size for path in files for key, size in _tensors(folder, f"{name}/{path.name}").items()
    }


def _check_values(folder: Path, seal: Seal | None, as_written: dict[str, Any]) -> None:
    """Check every byte against the seal; where there is none, that all values are finite.

    Under a seal, values that are not finite are what the run had: of a task that was stopped for
    them, which must not keep others from going on.

    Raises
    ------
    _Broken
        A file is another than was written, or holds values that a run without a seal cannot have.
    """
    if seal is not None and (name := broken_by(seal, folder, as_written, STATE_FILE)):
        raise _Broken(f"{name} is damaged (its SHA-256 is not that of what was written)")
    for path in sorted(folder.rglob("*.safetensors")):
        if (tensor := not_finite(path)) is None:
            continue
        found = f"{path.relative_to(folder)} holds values that are not finite ({tensor})"
        if seal is None:
            raise _Broken(found)
        log.warning("%s: %s, as it was saved", folder, found)


def _progress_of_format_1(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take what became of each task out of a state of format 1 and return it by name.

    There it is listed in the order of the tasks, and a task's own steps were those of the run for
    as long as it took part.
    """
    entries = {}
    for record, entry in zip(content["tasks"], content.pop("lives"), strict=True):
        steps = min(content["step"], entry["num_steps"])
        if entry["stopped"] is not None:
            steps = entry["updates"] + entry["skipped"]
        entries[record["name"]] = {**entry, "steps": steps}
    return entries


def _tensors(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name; opening also finds a file cut short.

    Raises
    ------
    _Broken
        The file is missing or damaged.
    """
    if not (folder / name).is_file():
        raise _Broken(f"{name} is missing")
    try:
        check_regular(folder / name)
        with safe_open(folder / name, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    except (SafetensorError, OSError, ConfigError) as error:
        raise _Broken(f"{name} is damaged ({error})") from error


def newest_whole(run: Path) -> tuple[int | None, list[str]]:
    """Return the step of the newest checkpoint that can be resumed from, None if there is none.

    Returns
    -------
    tuple
        The step, and of every later checkpoint why it is not usable.
    """
    broken: list[str] = []
    for step in reversed(list_checkpoints(run)):
        try:
            _read(step_folder(run, step), whole=True)
            return step, broken
        except _Broken as error:
            broken.append(f"{step_folder(run, step)}: {error}")
    return None, broken


def read_state(run: Path, step: int | None, *, whole: bool = True) -> CheckpointState:
    """Return the state of a run's checkpoint; of the last one when `step` is None.

    Parameters
    ----------
    run
        The run's folder.
    step
        Of the checkpoint.
    whole
        Whether every file is compared with its digest; else, of tensors, only the headers are read.

    Raises
    ------
    ConfigError
        There is no such checkpoint, or some file of it is missing or damaged; the message then
        names the last step that is whole.
    """
    steps = list_checkpoints(run)
    if not steps:
        raise ConfigError(f"--resume: {run / FOLDER} holds no checkpoint")
    step = steps[-1] if step is None else step
    if step not in steps:
        have = ", ".join(map(str, steps))
        raise ConfigError(f"--resume {step}: {run / FOLDER} has only the steps {have}")
    folder = step_folder(run, step)
    try:
        return _read(folder, whole=whole)
    except _Broken as error:
        last, _ = newest_whole(run)
        remedy = "none is complete" if last is None else f"the last complete one is --resume {last}"
        raise ConfigError(f"{folder}: not a usable checkpoint: {error}; {remedy}") from error


def load_best(run: Path, step: int, name: str) -> dict[str, Tensor]:
    """Return the best adapter that a checkpoint has of a task, by PEFT's names."""
    return load_file(step_folder(run, step) / BEST_FOLDER / name / WEIGHTS_FILE)


def load_moments(
    folder: Rank0Folder, file: str, optimizer: AdapterOptimizer, number: int, updates: int
) -> None:
    """Load a task's moments from a file of a folder, after so many updates. Collective."""
    kinds = optimizer.moment_names(number)
    names = optimizer.stage.slots[number].layout.places
    found = folder.tensors(file, {f"{kind}/{name}" for kind in kinds for name in names})
    moments = {kind: {name: found[f"{kind}/{name}"] for name in names} for kind in kinds}
    optimizer.load_moments(number, moments, updates)
