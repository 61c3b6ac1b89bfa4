"""A line to the coordinator that counts what passes, and may be slow: a proxy for TCP."""

import asyncio
import contextlib
import threading
import time

_PIECE = 64 * 1024  # bytes
_WAITING = 4 * _PIECE  # bytes that may wait to be taken


class Line:
    """One site's line, in both directions apart; TLS passes through it as it is.

    Args:
        upstream: Port of this machine that the line leads to.
        rate: Bytes a second in each direction, 0 for as fast as it goes; may be changed.
    """

    def __init__(self, upstream, rate=0.0):
        self.upstream, self.rate = upstream, rate
        self.up = self.down = 0  # bytes that passed
        self._free = {"up": 0.0, "down": 0.0}  # when each direction can take the next piece
        self._loop = asyncio.new_event_loop()
        opened = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_WAITING)
        self._server = self._loop.run_until_complete(opened)
        self.port = self._server.sockets[0].getsockname()[1]
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _serve(self, reader, writer):
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.upstream, limit=_WAITING)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass("up", reader, back), self._pass("down", there, writer))

    async def _pass(self, way, reader, writer):
        writer.transport.set_write_buffer_limits(high=_WAITING)
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                await self._take_turn(way, len(piece))
                setattr(self, way, getattr(self, way) + len(piece))
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def _take_turn(self, way, size):
        """Wait until a piece may pass; connections of the same line share its rate."""
        if self.rate:
            now = time.monotonic()
            self._free[way] = max(now, self._free[way]) + size / self.rate
            await asyncio.sleep(self._free[way] - now)
