"""Why a call ended before its handler was done."""

from __future__ import annotations

import enum


class EndedBy(enum.Enum):
    """Why a handler was cancelled before it was done."""

    CLIENT_CANCEL = "client_cancel"
    """The client reset the stream: it no longer wants the answer."""

    CONNECTION_LOST = "connection_lost"
    """The client or the network between went away; the client may well come back for the answer."""

    DEADLINE = "deadline"
    """The client's deadline passed."""

    SHUTDOWN = "shutdown"
    """This server is stopping."""
