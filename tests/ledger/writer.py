"""A process that grants passes as fast as it can, and says so after each, until it is killed."""

import asyncio
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection

from tests.ledger.given import Engine, TurnedClock, credential, reservation

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.ledger.writer"])  # so that a trial costs a fork, not a start of Python


def write(name: str, url: str, told: Connection) -> None:
    async def grant_until_killed() -> None:
        async with Engine(name, url, TurnedClock()).opened() as ledger:
            while True:
                each = reservation()
                given = credential(f"conv_{each.pass_id}")
                if int(each.pass_id, 16) % 2:
                    await ledger.reserve(each, [], ready=given)
                else:
                    await ledger.reserve(each, [])
                    await ledger.grant(each, given)
                told.send_bytes(f"conv_{each.pass_id}".encode())

    asyncio.run(grant_until_killed())


def acknowledged_before_killed(name: str, url: str, *, after_seconds: float) -> list[str]:
    """Start the writer, kill it that long after its first word, and return all that it had said."""
    heard, told = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=write, args=(name, url, told))
    process.start()
    told.close()
    said: list[str] = []
    try:
        said.append(heard.recv_bytes().decode())
        kill_at = time.monotonic() + after_seconds
        while (left_seconds := kill_at - time.monotonic()) > 0:
            if heard.poll(left_seconds):
                said.append(heard.recv_bytes().decode())
        process.kill()
        while True:
            said.append(heard.recv_bytes().decode())
    except EOFError:
        return said
    finally:
        process.join(timeout=10)
        assert process.exitcode == -signal.SIGKILL
        process.close()
        heard.close()
