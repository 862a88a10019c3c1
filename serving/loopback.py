"""Connections of aiohttp to an engine on this machine, whose address is known.

aiohttp's own connector looks for addresses and tries one after the other, and uvloop asks a thread to resolve each of them: about
half a millisecond before every request.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import BaseConnector, ClientConnectorError, ClientTimeout


class LoopbackConnector(BaseConnector):
    """Opens a connection for each request and closes it after: llama.cpp closes one after a stream, and does not say so.

    Args:
        host: an IP address.
        port: its port.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(limit=0, force_close=True)
        self.host, self.port = host, port

    async def _create_connection(self, req: Any, traces: Any, timeout: ClientTimeout) -> Any:  # noqa: ARG002 - aiohttp's signature
        try:
            async with asyncio.timeout(timeout.sock_connect):
                return (await self._loop.create_connection(self._factory, self.host, self.port))[1]
        except TimeoutError:  # an OSError too; aiohttp has an error of its own for it
            raise
        except OSError as error:
            raise ClientConnectorError(req.connection_key, error) from error
