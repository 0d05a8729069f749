"""The dashboard's process: an aggregator starts it, and it ends with the aggregator."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import uvicorn

from ternbus.aggregator.dashboard.app import Dashboard
from ternbus.aggregator.dashboard.audit import Audit
from ternbus.aggregator.dashboard.connections import HEADER_BYTES_MAX, Connection, Server, ignore_terminal
from ternbus.aggregator.dashboard.reader import Reader
from ternbus.aggregator.dashboard.sessions import Sessions
from ternbus.broker.log_output import LogOutput, take_library_lines

NICE: Final = 5  # the aggregator comes first
KEEP_ALIVE_S: Final = 15
END_WITHIN_S: Final = 2


async def serve(
    listener: socket.socket, directory: Path, hosts: frozenset[str], log: LogOutput, *, private: bool
) -> None:
    """Serve until standard input ends, as it does when the aggregator does, or until SIGTERM."""
    reader = Reader(directory)
    dashboard = Dashboard(
        directory=directory,
        port=listener.getsockname()[1],
        is_private=private,
        sessions=Sessions(directory),
        audit=Audit.open(directory, log),
        reader=reader,
    )
    server = Server(
        uvicorn.Config(
            dashboard.application(hosts),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # whoever is at the other end is who asks
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES_MAX,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=END_WITHIN_S,
        )
    )
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    loop.add_reader(sys.stdin.fileno(), ending.set)

    async def end() -> None:
        await ending.wait()
        loop.remove_reader(sys.stdin.fileno())
        await reader.close()
        server.should_exit = True

    ender = asyncio.create_task(end())
    await server.serve([listener])
    await dashboard.finish()
    ender.cancel()


def main() -> None:
    """Serve on a socket that the aggregator has opened."""
    parser = argparse.ArgumentParser(prog="ternbus.aggregator.dashboard", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--descriptor", type=int, required=True, help="of a socket that listens")
    parser.add_argument("--host", action="append", default=[], help="name by which the dashboard is reached")
    parser.add_argument("--private", action="store_true", help="reading needs the token too")
    parser.add_argument("--json", action="store_true", help="log lines as JSON")
    given = parser.parse_args()
    ignore_terminal()
    os.nice(NICE)
    log = LogOutput(as_json=given.json)
    take_library_lines(log)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # a warning is what a peer caused
    with socket.socket(fileno=given.descriptor) as listener:
        asyncio.run(serve(listener, given.directory, frozenset(given.host), log, private=given.private))
    os._exit(0)  # a read that waits for the aggregator must not hold this up; nothing of it is on disk


if __name__ == "__main__":
    main()
