"""The way between the service's process and rank 0: orders there, reports back."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import numpy as np

from lobra.layout.order import StepOrder
from lobra.model.heartbeat import beat
from lobra.trainer.engine import Engine
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.signals import StopRequest
from lobra.trainer.step_report import StepReport

IDLE_S = 10.0  # so often ranks that have nothing to do are told so: one that is gone is missed


class RanksEnded(Exception):
    """Rank 0 does not answer any more; why, only its process knows."""


class EngineLink:
    """The service's end."""

    def __init__(self, listener: Listener) -> None:
        """Wait until rank 0 is there; RanksEnded if it is so no more."""
        try:
            self.connection: Connection = listener.accept()
        except (OSError, EOFError, AuthenticationError) as error:
            raise RanksEnded from error
        self._receive()

    def carry_out(self, order: StepOrder) -> StepReport | None:
        """Have all ranks carry out an order; return what became of its sequences, if it has any.

        Raises
        ------
        RanksEnded
            Rank 0 has ended before it said so.
        """
        try:
            self.connection.send_bytes(order.encoded.tobytes())
        except OSError as error:
            raise RanksEnded from error
        return self._receive()

    def _receive(self) -> StepReport | None:
        try:
            report: StepReport | None = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RanksEnded from error
        return report

    def close(self) -> None:
        """End the ranks."""
        self.connection.close()


def serve_rank(
    run: RunSpec,
    address: str = "",
    authkey: bytes = b"",
    on_signal: Callable[[int], None] | None = None,
) -> None:
    """Carry out the service's orders as this rank of an initialised world. Collective.

    Parameters
    ----------
    run
        What the service has prepared.
    address, authkey
        Where it listens, and what it lets in; for rank 0.
    on_signal
        Told of the first stop signal, and to have the service stop: by itself a rank does not.
    """
    with StopRequest(on_signal):
        engine = Engine(run, None, lambda: False)
        if engine.rank:
            engine.follow()
            return
        with Client(address, authkey=authkey) as connection:
            connection.send(None)
            _follow(engine, connection)


def _follow(engine: Engine, connection: Connection) -> None:
    """Pass every order on, as rank 0, until the last one."""
    while True:
        beat("waiting for its order", expected_s=max(engine.step_times_s, default=0.0))
        if not connection.poll(IDLE_S):
            engine.control.send(StepOrder(0))
            continue
        order = StepOrder.decode(np.frombuffer(connection.recv_bytes(), dtype=np.int64))
        start = time.perf_counter()
        engine.control.send(order)
        report = engine.carry_out(order)
        if order.sequences:
            engine.step_times_s.append(time.perf_counter() - start)
        connection.send(report)
        if order.stop:
            return
