"""The routes of what training leaves behind: runs and checkpoints, to list, fetch and delete."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from lobra.service.bodies import OfLife, WeightsInfo
from lobra.service.changes import SAMPLER_WEIGHTS, WEIGHTS
from lobra.service.deployment import PATH_PREFIX
from lobra.service.intake import MLP, Intake
from lobra.service.sender import Sender
from lobra.service.tables import CheckpointRow, ModelRow, checkpoints, models
from lobra.tasks.target_modules import HEAD

KINDS = {WEIGHTS: "training", SAMPLER_WEIGHTS: "sampler"}
BLOCK_BYTES = 1 << 20  # of a file that is sent
RUN = "/training_runs/{model_id}"
CHECKPOINT = RUN + "/checkpoints/{kind}/{name}"
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=1 << 62)]


def checkpoint_routes(intake: Intake) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    deployment, ledger = intake.deployment, intake.ledger

    def run_of(model: ModelRow) -> dict[str, Any]:
        last = {row.kind: _checkpoint(row) for row in ledger.checkpoints_of(model.id)}
        return {
            "training_run_id": model.id,
            "base_model": deployment.names[0],
            "model_owner": model.tenant,
            "is_lora": True,
            "lora_rank": model.rank,
            "last_request_time": _date(ledger.last_use(model)),
            "last_checkpoint": last.get(WEIGHTS),
            "last_sampler_checkpoint": last.get(SAMPLER_WEIGHTS),
            "user_metadata": model.user_metadata,
        }

    @routes.get("/training_runs")
    def list_runs(sender: Sender, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        rows, total = ledger.listed(models, sender.name, limit, offset)
        cursor = {"offset": offset, "limit": limit, "total_count": total}
        return {"training_runs": [run_of(ModelRow(**row)) for row in rows], "cursor": cursor}

    @routes.get(RUN)
    def training_run(model_id: str, sender: Sender) -> dict[str, Any]:
        return run_of(intake.model(sender, model_id))

    @routes.get("/checkpoints")
    def list_all(sender: Sender, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
        rows, total = ledger.listed(checkpoints, sender.name, limit, offset)
        cursor = {"offset": offset, "limit": limit, "total_count": total}
        found = [_checkpoint(CheckpointRow(**row)) for row in rows]
        return {"checkpoints": found, "cursor": cursor}

    @routes.get(RUN + "/checkpoints")
    def list_checkpoints(model_id: str, sender: Sender) -> dict[str, Any]:
        rows = ledger.checkpoints_of(intake.model(sender, model_id).id)
        return {"checkpoints": [_checkpoint(row) for row in rows]}

    @routes.delete(CHECKPOINT)
    def delete_checkpoint(model_id: str, kind: str, name: str, sender: Sender) -> Response:
        row = intake.checkpoint(sender, f"{PATH_PREFIX}{model_id}/{kind}/{name}")
        ledger.forget_checkpoint(row.path)
        return Response(status_code=204)

    @routes.put(CHECKPOINT + "/ttl")
    def set_life(model_id: str, kind: str, name: str, body: OfLife, sender: Sender) -> Response:
        row = intake.checkpoint(sender, f"{PATH_PREFIX}{model_id}/{kind}/{name}")
        life_s = body.ttl_seconds
        ledger.set_expiry(row.path, None if life_s is None else time.time() + life_s)
        return Response(status_code=204)

    @routes.get(CHECKPOINT + "/archive")
    def archive(model_id: str, kind: str, name: str, sender: Sender) -> Response:
        path = f"{PATH_PREFIX}{model_id}/{kind}/{name}"
        row = intake.checkpoint(sender, path, to_fetch=True)
        content = tar_of(deployment.state_folder.checkpoint(row), name)
        return StreamingResponse(content, media_type="application/x-tar")

    @routes.post("/weights_info")
    def weights_info(body: WeightsInfo, sender: Sender) -> dict[str, Any]:
        model = intake.model(sender, intake.checkpoint(sender, body.tinker_path).model_id)
        return {
            "base_model": deployment.names[0],
            "is_lora": True,
            "lora_rank": model.rank,
            "train_unembed": HEAD in model.target_modules,
            "train_mlp": MLP[0] in model.target_modules,
            "train_attn": "q_proj" in model.target_modules,
        }

    return routes


def tar_of(folder: Path, name: str) -> Iterator[bytes]:
    """Yield a folder's files as an archive, in which they are in a folder of this name."""
    for file in sorted(folder.iterdir()):
        with file.open("rb") as content:
            entry = tarfile.TarInfo(f"{name}/{file.name}")
            status = file.stat()
            entry.size, entry.mtime = status.st_size, int(status.st_mtime)
            yield entry.tobuf()
            while block := content.read(BLOCK_BYTES):
                yield block
            yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _checkpoint(row: CheckpointRow) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": KINDS[row.kind],
        "time": _date(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "user_metadata": row.user_metadata,
        "expires_at": None if row.expires_at is None else _date(row.expires_at),
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
