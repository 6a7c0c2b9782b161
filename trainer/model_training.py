"""What an engine has where a model is trained whole instead of adapters."""

from __future__ import annotations

from pathlib import Path

from lobra.model.stage import Stage
from lobra.model.trained_stage import TrainedWeights
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.checkpoint_folder import step_folder
from lobra.trainer.control import Control
from lobra.trainer.model_exporter import ModelExporter
from lobra.trainer.model_folder import files_of
from lobra.trainer.model_optimizer import ModelOptimizer
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.zero import MASTER


def checkpoint_model(run: Path, step: int, name: str) -> Path:
    """Return where a checkpoint has the model of the task with this name."""
    return step_folder(run, step) / "adapters" / name


def starting_folder(run: RunSpec, resumed: CheckpointState | None) -> Path:
    """Return the model folder that a run's stages are read from."""
    if resumed is None or not run.trains_model:
        return run.model_folder
    return checkpoint_model(run.output_dir, resumed.step, run.tasks[0].name)


def train_model(
    run: RunSpec, stage: Stage, control: Control, resumed: CheckpointState | None
) -> tuple[ModelOptimizer, ModelExporter]:
    """Make a stage's own weights the run's only task, from a checkpoint's on if one is given.

    Collective.
    """
    (task,) = run.tasks
    files = files_of(run.model_folder, stage.shape)
    sizes = {name: size for own in files.values() for name, size in own.items()}
    weights = TrainedWeights(stage, 0, adapter_spec(task, run.seed), sizes)
    stage.slots[0] = weights
    optimizer = ModelOptimizer(stage, weights, run.world)
    optimizer.install(0, task)
    if resumed is not None:
        moments = step_folder(run.output_dir, resumed.step) / "moments" / task.name
        folders = {kind: moments / kind for kind in optimizer.moment_names(0)}
        folders[MASTER] = checkpoint_model(run.output_dir, resumed.step, task.name)
        optimizer.load(folders, resumed.progress[task.name].updates)
    return optimizer, ModelExporter(run, stage, optimizer, control.group, files)
