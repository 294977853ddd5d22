"""The probe of a sandbox: does it answer? `worker.keeper` runs it, and has the deadline.

No `asyncio.wait_for` here: that of Python 3.11 loses a cancellation that comes at the moment at which
what it waits for ends, so that a probe went on for ever (seen on a busy machine).
"""

import asyncio

from worker.journal import Journal
from worker.spec import READY

FIRST_DELAY_S, LAST_DELAY_S = 0.02, 0.5  # netstack answers within a millisecond once the program listens
CONNECT_TIMEOUT_S = 2.0  # for a SYN without an answer; a closed port answers at once


async def until_ready(known: Journal) -> str:
    """Probe until the sandbox answers; what it answered, in words."""
    match = READY.fullmatch(known.spec.ready)
    if match is None or known.spec.ready == "none":
        return "no probe asked for"
    if not known.data["network"]["ips"]:
        raise ValueError(f"network {known.spec.network} gave it no address")
    address, delay_s = known.data["network"]["ips"][0], FIRST_DELAY_S
    while True:
        try:
            if match["http"]:
                return await _http(address, int(match["http"]), match["path"])
            return await _tcp(address, int(match["tcp"]))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            await asyncio.sleep(delay_s)  # nothing tells us when a remote port opens
            delay_s = min(LAST_DELAY_S, delay_s * 1.3)


async def _tcp(address: str, port: int) -> str:
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        _, writer = await asyncio.open_connection(address, port)
    writer.close()
    return f"{address}:{port} accepts"


async def _http(address: str, port: int, path: str) -> str:
    """Ready is any status below 400, as for Kubernetes' httpGet probes."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(address, port)
    host = f"[{address}]" if ":" in address else address
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\nUser-Agent: sandbatch\r\n\r\n".encode())
        status_line = await reader.readuntil(b"\r\n")  # bounded by the deadline of the whole wait
        status = int(status_line.split()[1])
        if not status_line.startswith(b"HTTP/") or not 200 <= status < 400:
            raise ValueError(status)
        return f"HTTP {status}"
    except IndexError:
        raise ValueError("no HTTP") from None
    finally:
        writer.close()
