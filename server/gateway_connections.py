"""Connections of the gateway: who does not ask in time is sent away, and nobody can take them all.

Whoever reaches the port can open connections and say nothing, or a header a minute. Such a
connection waits only some seconds. Past a number of connections, of one address or of all
together, a new one takes the place of the one that waits the longest; those with a request
under way keep theirs.
"""

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_WAIT = 15.0  # seconds from a connection, or the first byte of a request, to its headers
PER_ADDRESS = 100  # sites behind one proxy share an address; each holds about five
CONNECTIONS = 400


class GatewayLoop(asyncio.SelectorEventLoop):
    """A loop whose servers give up a TLS handshake, and its end, as soon as a request."""

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        """Return a server; see the base class."""
        waits = {"ssl_handshake_timeout": HEADER_WAIT, "ssl_shutdown_timeout": HEADER_WAIT}
        return await super().create_server(*arguments, **{**options, **waits})


class GatewayConnection(H11Protocol):
    """One connection of the gateway."""

    since = 0.0  # time of the loop from which it waits for headers
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, and that of another connection if there is none left."""
        super().connection_made(transport)
        self._expect_headers()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        """Read on; headers have to be there in time."""
        super().data_received(data)
        if not self.waits:
            self._headers_came()
        elif self.timer is None:
            self._expect_headers()

    def on_response_complete(self) -> None:
        """Keep the connection for another request; it is the youngest of those that wait."""
        super().on_response_complete()
        self.since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._headers_came()
        super().connection_lost(exc)

    @property
    def waits(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def address(self) -> str:
        """Where it comes from."""
        return self.client[0] if self.client else ""

    def _expect_headers(self) -> None:
        self.since = self.loop.time()
        self.timer = self.loop.call_later(HEADER_WAIT, self.transport.abort)

    def _headers_came(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _make_room(self) -> None:
        others = [one for one in self.connections if isinstance(one, GatewayConnection)]
        held = Counter(one.address for one in others)
        crowded = self.address
        if held[crowded] <= PER_ADDRESS:
            if len(others) <= CONNECTIONS:
                return
            crowded = held.most_common(1)[0][0]
        waiting = [one for one in others if one.address == crowded and one.waits]
        gone = min(waiting, key=lambda one: one.since, default=self)
        self.connections.discard(gone)
        gone.transport.abort()
