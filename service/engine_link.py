"""The way between the service's process and rank 0: orders there, reports back."""

from __future__ import annotations

from multiprocessing.connection import Client, Connection, Listener

import numpy as np

from lobra.layout.order import StepOrder
from lobra.trainer.engine import Engine
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.signals import StopRequest
from lobra.trainer.step_report import StepReport

IDLE_S = 600.0  # ranks are told so often that there is nothing to do: they do not wait for ever


class EngineLink:
    """The service's end."""

    def __init__(self, listener: Listener) -> None:
        """Wait until rank 0 is there."""
        self.connection: Connection = listener.accept()
        self.connection.recv()

    def carry_out(self, order: StepOrder) -> StepReport | None:
        """Have all ranks carry out an order; return what became of its sequences, if it has any.

        Raises
        ------
        EOFError, OSError
            Rank 0 has ended.
        """
        self.connection.send_bytes(order.encoded.tobytes())
        report: StepReport | None = self.connection.recv()
        return report

    def close(self) -> None:
        """End the ranks."""
        self.connection.close()


def serve_rank(run: RunSpec, address: str, authkey: bytes) -> None:
    """Carry out the service's orders as this rank of an initialised world. Collective."""
    with StopRequest():  # the service says when to stop
        engine = Engine(run, None, lambda: False)
        if engine.rank:
            engine.follow()
            return
        with Client(address, authkey=authkey) as connection:
            connection.send("ready")
            _follow(engine, connection)


def _follow(engine: Engine, connection: Connection) -> None:
    """Pass every order on, as rank 0, until the last one."""
    while True:
        if not connection.poll(IDLE_S):
            engine.control.send(StepOrder(0))
            continue
        order = StepOrder.decode(np.frombuffer(connection.recv_bytes(), dtype=np.int64))
        engine.control.send(order)
        connection.send(engine.carry_out(order))
        if order.stop:
            return
