"""The thread that has samples drawn: it takes what waits, and gives it to the sampler's process.

The process is started with the first request, so that a service that only trains has no second copy
of the base model.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from lobra.service.deployment import Deployment
from lobra.service.ledger import Ledger
from lobra.service.sampler import SampleRequest, SampleResult, sample_for_ever
from lobra.service.wire import sample_output

log = logging.getLogger(__name__)

MOST_ROWS = 64  # sequences drawn at once


class Sampling:
    """Requests for samples; `submit` and `stop` may be called from any thread."""

    def __init__(
        self, deployment: Deployment, ledger: Ledger, finished: Callable[[str], None]
    ) -> None:
        """Call ``finished`` with the name of every request."""
        self.deployment = deployment
        self.ledger = ledger
        self.finished = finished
        self._waiting: list[tuple[str, SampleRequest]] = []
        self._changed = threading.Condition()
        self._stop = False
        self._connection: Connection | None = None

    def submit(self, request_id: str, content: SampleRequest) -> None:
        """Have samples drawn for a request that is in the ledger."""
        with self._changed:
            self._waiting.append((request_id, content))
            self._changed.notify()

    def stop(self) -> None:
        """End after the samples in progress."""
        with self._changed:
            self._stop = True
            self._changed.notify()

    def run(self) -> None:
        """Have samples drawn until `stop`."""
        while batch := self._next():
            for request_id in [name for name, content in batch if not _has_adapter(content)]:
                self._finish(request_id, None, "the weights to sample from were deleted")
            batch = [entry for entry in batch if _has_adapter(entry[1])]
            requests = [content for _, content in batch]
            try:
                results = self._sampled(requests) if requests else []
            except (EOFError, OSError):
                self._connection = None
                log.error("the sampler has ended; it is started again for the next request")
                for request_id, _ in batch:
                    self._finish(request_id, None, "the sampler has ended; ask again")
                continue
            for (request_id, _), result in zip(batch, results, strict=True):
                self._finish(request_id, sample_output(result))

    def _next(self) -> list[tuple[str, SampleRequest]]:
        """Wait for requests; return as many as are drawn at once, none to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stop)
            if self._stop:
                return []
            rows, count = 0, 0
            for _, content in self._waiting:
                rows += content.num_samples
                if count and rows > MOST_ROWS:
                    break
                count += 1
            batch, self._waiting = self._waiting[:count], self._waiting[count:]
            return batch

    def _sampled(self, requests: list[SampleRequest]) -> list[SampleResult]:
        if self._connection is None:
            self._connection = self._start()
        self._connection.send(requests)
        results: list[SampleResult] = self._connection.recv()
        return results

    def _start(self) -> Connection:
        """Start the sampler's process, which ends when this one does."""
        run = self.deployment.run
        method = "spawn" if run.device == "cuda" else "forkserver"
        context = multiprocessing.get_context(method)
        own, other = context.Pipe()
        process = context.Process(  # type: ignore[attr-defined]
            target=sample_for_ever,
            args=(other, run.model_folder, run.precision, run.device),
            daemon=True,
        )
        process.start()
        other.close()
        connection: Connection = own
        return connection

    def _finish(self, request_id: str, result: bytes | None, error: str | None = None) -> None:
        self.ledger.finish(request_id, result, error)
        self.finished(request_id)


def _has_adapter(content: SampleRequest) -> bool:
    return content.adapter is None or content.adapter.is_dir()
