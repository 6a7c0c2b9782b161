"""Threads that solve LobRA's problems in SCIP beside each other, and stop when they are told to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from lobra.planner.bucketed.identical import IdenticalModel, IdenticalResult

STOP_EVERY_S = 0.05


class Solvers:
    """Threads that build and solve models; an exception in the block (Ctrl-C) stops them at once.

    SCIP runs outside the main thread, where Python takes the signal.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=workers)
        self._models: dict[int, IdenticalModel] = {}
        self._running: set[Future[IdenticalResult]] = set()
        self._stopped = False

    def submit(
        self,
        build: Callable[[], IdenticalModel],
        time_limit_s: float | None,
        at_most_s: float | None,
        at_least_s: float,
    ) -> Future[IdenticalResult]:
        """Solve the model that ``build`` returns, with ``IdenticalModel.solve``'s arguments."""

        def work() -> IdenticalResult:
            model = build()
            self._models[id(model)] = model
            try:
                if self._stopped:
                    model.stop()
                return model.solve(time_limit_s, at_most_s, at_least_s)
            finally:
                del self._models[id(model)]

        future = self._pool.submit(work)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def __enter__(self) -> Solvers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stopped = True
            self._pool.shutdown(wait=False, cancel_futures=True)
            # again and again: SCIP forgets an interrupt that comes just before it starts, and
            # refuses one while it sets up or frees what it solves with
            while wait(list(self._running), timeout=STOP_EVERY_S).not_done:
                for model in list(self._models.values()):
                    with contextlib.suppress(Exception):
                        model.stop()
        self._pool.shutdown()
