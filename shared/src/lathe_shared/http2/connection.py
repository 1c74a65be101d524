"""A whole HTTP/2 connection without I/O, either side.

Bytes go in by ``receive``; what is to be written collects in ``out``; what happens is told to the streams
(``Stream.on_…``) and to the owner (``ConnectionOwner``). Nothing here waits, knows a clock, or raises for what a peer
does: a peer's fault ends the stream or the connection, with the code that RFC 9113 asks for.

Spec: RFC 9113.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_shared.http2.errors import ConnectionFaultError
from lathe_shared.http2.receiving import ReceivingSide

if TYPE_CHECKING:
    from lathe_shared.http2.connection_state import ConnectionOwner
    from lathe_shared.http2.limits import Limits


class Connection(ReceivingSide):
    """A connection.

    Args:
        owner: Who is told what happens.
        limits: The bounds.
        is_client: Which side this is.
    """

    __slots__ = ()

    def __init__(self, owner: ConnectionOwner, limits: Limits, *, is_client: bool) -> None:
        super().__init__(owner, limits, is_client=is_client)
        self.start()

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer, however they were split.

        Args:
            data: What was read.
        """
        if self.is_closed:
            return
        self.bytes_received += len(data)
        try:
            self._receive(data)
        except ConnectionFaultError as fault:
            self.fail(fault.code, fault.reason)
        else:
            if self.uncredited_bytes << 2 >= self.limits.connection_window_bytes:
                self.credit()
