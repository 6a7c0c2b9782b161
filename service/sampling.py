"""The thread that has samples drawn: it takes what waits, and gives it to the sampler's process.

The process is started with the first request, so that a service that only trains has no second copy
of the base model.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection

from lobra.service.deployment import Deployment
from lobra.service.ledger import Ledger
from lobra.service.sampler import MOST_ROWS, SampleRequest, SampleResult, sample_for_ever
from lobra.service.sampler_room import SamplerRoom, row_bytes, sampler_room
from lobra.service.tables import SERVER, USER
from lobra.service.wire import sample_output

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that waits, and whose it is."""

    id: str
    tenant: str
    content: SampleRequest


class Sampling:
    """Requests for samples; `submit` and `stop` may be called from any thread."""

    def __init__(
        self, deployment: Deployment, ledger: Ledger, finished: Callable[[str], None]
    ) -> None:
        """Call ``finished`` with the name of every request."""
        self.deployment = deployment
        self.ledger = ledger
        self.finished = finished
        self._waiting: list[_Waiting] = []
        self._served: dict[str, int] = defaultdict(int)  # tokens of each tenant that waits
        self._changed = threading.Condition()
        self._stop = False
        self._connection: Connection | None = None

    def submit(self, request_id: str, tenant: str, content: SampleRequest) -> None:
        """Have samples drawn for a request that is in the ledger."""
        content = replace(content, row_bytes=self._row_bytes(content))
        if content.row_bytes > self.room.free_bytes:
            error = f"a sequence of it takes {content.row_bytes:,} bytes, more than there are"
            self._finish(request_id, None, f"{error}; ask for fewer tokens")
            return
        with self._changed:
            others = {entry.tenant for entry in self._waiting}
            if others and tenant not in others:  # who comes back has no more claim than they
                least = min(self._served[other] for other in others)
                self._served[tenant] = max(self._served[tenant], least)
            self._waiting.append(_Waiting(request_id, tenant, content))
            self._changed.notify()

    @cached_property
    def room(self) -> SamplerRoom:
        """Where samples are drawn."""
        return sampler_room(self.deployment)

    def _row_bytes(self, content: SampleRequest) -> int:
        shape, precision = self.deployment.shape, self.deployment.run.precision
        sizes = len(content.prompt), content.max_tokens
        return row_bytes(shape, precision, *sizes, content.prompt_logprobs)

    def give_up(self, request_id: str) -> None:
        """Tell a request that what it is to be sampled from is gone."""
        self._finish(request_id, None, "the weights to sample from were deleted")

    def stop(self) -> None:
        """End after the samples in progress."""
        with self._changed:
            self._stop = True
            self._changed.notify()

    def run(self) -> None:
        """Have samples drawn until `stop`."""
        while batch := self._next():
            try:
                results = self._sampled([entry.content for entry in batch])
            except (EOFError, OSError):
                self._connection = None
                log.error("the sampler has ended; it is started again for the next request")
                for entry in batch:
                    self._finish(entry.id, None, "the sampler has ended; ask again", SERVER)
                continue
            for entry, result in zip(batch, results, strict=True):
                if result is None:
                    self.give_up(entry.id)
                else:
                    self._finish(entry.id, sample_output(result))

    def _next(self) -> list[_Waiting]:
        """Wait for requests; return as many as are drawn at once, none to end.

        The tenant of whom fewest tokens were drawn, since all were last served, comes first.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stop)
            if self._stop:
                return []
            batch: list[_Waiting] = []
            rows = 0
            while self._waiting:
                entry = min(self._waiting, key=lambda entry: self._served[entry.tenant])
                rows += entry.content.num_samples
                if batch and rows > MOST_ROWS:
                    break
                batch.append(entry)
                self._waiting.remove(entry)
                self._served[entry.tenant] += entry.content.num_samples * entry.content.max_tokens
            if not self._waiting:
                self._served.clear()
            return batch

    def _sampled(self, requests: list[SampleRequest]) -> list[SampleResult | None]:
        if self._connection is None:
            self._connection = self._start()
        self._connection.send(requests)
        results: list[SampleResult | None] = self._connection.recv()
        return results

    def _start(self) -> Connection:
        """Start the sampler's process, which ends when this one does."""
        run = self.deployment.run
        method = "forkserver" if run.device == "cpu" else "spawn"
        context = multiprocessing.get_context(method)
        own, other = context.Pipe()
        process = context.Process(  # type: ignore[attr-defined]
            target=sample_for_ever,
            args=(other, run.model_folder, run.precision, *vars(self.room).values()),
            daemon=True,
        )
        process.start()
        other.close()
        connection: Connection = own
        return connection

    def _finish(
        self,
        request_id: str,
        result: bytes | None,
        error: str | None = None,
        category: str = USER,
    ) -> None:
        self.ledger.finish(request_id, result, error, category=category)
        self.finished(request_id)
