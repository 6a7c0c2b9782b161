"""What is read of a body: no more than is known beforehand, nor for ever, nor of strangers."""

from __future__ import annotations

import asyncio

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lobra.service.ledger import Ledger
from lobra.service.tenants import tenant_of

MOST_BYTES = 32 << 20  # the client sends 5 MB at most
MOST_BYTES_OF_STRANGERS = 1 << 16
MOST_S = 120.0  # for a body to come


class BodyLimits:
    """Refuses bodies that are too large, and gives up those that do not come."""

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        """Stand before an application whose tenants a ledger knows."""
        self.app = app
        self.ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (refusal := await self._refusal(Headers(scope=scope))) is not None:
            return await refusal(scope, receive, send)
        await self.app(scope, _within_time(receive), send)

    async def _refusal(self, headers: Headers) -> JSONResponse | None:
        size = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not size.isdecimal() or int(size) > MOST_BYTES:
            text = f"want a body of a known length, at most {MOST_BYTES:,} bytes"
            return JSONResponse({"detail": text}, 413)
        if int(size) > MOST_BYTES_OF_STRANGERS:
            key = headers.get("x-api-key", "")
            if await run_in_threadpool(tenant_of, self.ledger, key) is None:
                return JSONResponse({"detail": "X-API-Key: is no key of this service"}, 401)
        return None


def _within_time(receive: Receive) -> Receive:
    """Return what receives a body, or that its sender is gone if it takes too long."""
    until = asyncio.get_running_loop().time() + MOST_S
    is_whole = False

    async def next_message() -> Message:
        nonlocal is_whole
        if is_whole:  # what comes now is that the sender goes, whenever it does
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        is_whole = not message.get("more_body", False)
        return message

    return next_message
