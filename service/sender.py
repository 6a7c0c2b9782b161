"""Who sends a request: the tenant whose key comes with it."""

from __future__ import annotations

import base64
from typing import Annotated

from fastapi import Depends, Header, Request

from lobra.service.refusal import Refusal
from lobra.service.tenants import Tenant, tenant_of


def _sender(
    request: Request,
    x_api_key: Annotated[str, Header()] = "",
    authorization: Annotated[str, Header()] = "",
) -> Tenant:
    """Return the tenant who sent a request; browsers send the key as a password."""
    # Only what changes nothing: other sites can have browsers send passwords they know.
    password = _password(authorization) if request.method == "GET" else ""
    found = tenant_of(request.app.state.ledger, x_api_key or password)
    if found is None:
        raise Refusal(401, "X-API-Key: is no key of this service; lobra keys add makes one")
    return found


def _password(authorization: str) -> str:
    """Return the password of HTTP's basic authentication, "" if there is none."""
    kind, _, coded = authorization.partition(" ")
    try:
        plain = base64.b64decode(coded, validate=True).decode() if kind == "Basic" else ""
    except ValueError:
        return ""
    return plain.partition(":")[2]


Sender = Annotated[Tenant, Depends(_sender)]
