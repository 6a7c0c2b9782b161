"""MLflow: a run's curves and configuration, on a tracking server or in the run's folder."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic

EXPERIMENT = "lobra"  # where MLFLOW_EXPERIMENT_NAME names none
FOLDER = "mlflow"  # in the run's folder: where MLFLOW_TRACKING_URI names no server
ID_FILE = f"{FOLDER}/run_id"  # a run that goes on is the same one there
MOST_PARAMETERS = 100  # MLflow's limit of a batch
MOST_METRICS = 1000  # the same
LONGEST_VALUE = 6000  # MLflow's limit of a parameter
#: MLflow's names have none of these; ours have, of layouts and tasks.
SPELLING = str.maketrans({"<": "", ">": "", ",": "_", "+": "_"})


class Mlflow:
    """Writes curves to the server that MLflow's own variables name, else into the run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any], begin: int) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (folder / FOLDER / "tracking").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its database needs more
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        id_path = folder / ID_FILE
        if id_path.is_file():
            self._run_id = id_path.read_text(encoding="utf-8")
            self._client.update_run(self._run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(number, run_name=folder.resolve().name)
        self._run_id = run.info.run_id
        parameters = [self._entities.Param(*pair) for pair in _flat(config)]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            part = parameters[start : start + MOST_PARAMETERS]
            self._client.log_batch(self._run_id, params=part)
        write_atomic(id_path, self._run_id)

    def write(self, values: dict[str, float], step: int) -> None:
        """Write the curves' values of a step."""
        now_ms = int(1000 * time.time())
        metrics = [
            self._entities.Metric(name.translate(SPELLING), value, now_ms, step)
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            part = metrics[start : start + MOST_METRICS]
            self._client.log_batch(self._run_id, metrics=part)

    def close(self, failed: bool) -> None:
        """Say that no more will come, and whether the run failed."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested mappings and lists by dotted names, as texts."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in entries:
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)[:LONGEST_VALUE]
