"""A network between sites and coordinator that can be slow, resets connections, or is cut."""

import asyncio
import random
import socket
import struct
import threading
import time
from typing import Self

_PIECE = 8 * 1024  # bytes that are passed on together


class BadNetwork:
    """Passes bytes between a port of its own and another one, as badly as it is told to.

    Attributes:
        port: Where it listens on this machine.
        to: The port that it leads to.
        rate: Bytes a second of all connections together, each way; 0 for as fast as it goes.
        reset: Probability with which a connection is reset at each piece of 8 KiB.
        cut: While true nothing passes; connections stay as they are, as when a cable is out.
        resets: Connections that were reset.
        passed: Bytes that went through.
    """

    def __init__(self, port: int, to: int = 0, seed: int = 0) -> None:
        self.port, self.to = port, to
        self.rate, self.reset, self.cut = 0, 0.0, False
        self.resets = self.passed = 0
        self._random = random.Random(seed)
        self._free = {"up": 0.0, "down": 0.0}  # when the next piece may pass
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def heal(self) -> None:
        """Be a good network from now on."""
        self.rate, self.reset, self.cut = 0, 0.0, False

    def reset_all(self) -> None:
        """Reset every connection there is, as a router does that starts again."""

        def abort() -> None:
            for writer in [*self._writers]:
                _abort(writer)

        self._loop.call_soon_threadsafe(abort)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        starting = asyncio.start_server(self._connected, "127.0.0.1", self.port)
        server = self._loop.run_until_complete(starting)
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while self.cut:
            await asyncio.sleep(0.2)
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:  # the gateway is being started again
            _abort(writer)
            return
        both = {writer, other_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass("up", reader, other_writer, both))
                group.create_task(self._pass("down", other_reader, writer, both))
        except* OSError:
            pass
        finally:
            self._writers -= both
            for each in both:
                each.close()

    async def _pass(
        self,
        way: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: set[asyncio.StreamWriter],
    ) -> None:
        while piece := await reader.read(_PIECE):
            while self.cut:
                await asyncio.sleep(0.2)
            if self._random.random() < self.reset:
                self.resets += 1
                for each in both:
                    _abort(each)
                return
            if self.rate:
                now = time.monotonic()
                self._free[way] = max(now, self._free[way]) + len(piece) / self.rate
                await asyncio.sleep(self._free[way] - now)
            writer.write(piece)
            await writer.drain()
            self.passed += len(piece)
        if writer.can_write_eof():
            writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset a connection: the other side gets an error and no end."""
    if (own := writer.get_extra_info("socket")) is not None:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
