"""A process that grants passes as fast as it can, and reports each, until it is killed."""

import asyncio
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection

from tests.ledger.given import Engine, TurnedClock, credential, reservation

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.ledger.writer"])  # so that a process is forked instead of started


def write(name: str, url: str, sender: Connection) -> None:
    async def grant_until_killed() -> None:
        async with Engine(name, url, TurnedClock()).open() as ledger:
            while True:
                each = reservation()
                given = credential(f"conv_{each.pass_id}")
                if int(each.pass_id, 16) % 2:
                    await ledger.reserve(each, [], ready=given)
                else:
                    await ledger.reserve(each, [])
                    await ledger.grant(each, given)
                sender.send_bytes(f"conv_{each.pass_id}".encode())

    asyncio.run(grant_until_killed())


def write_and_kill(name: str, url: str, *, after_seconds: float) -> list[str]:
    """Start the writer, kill it `after_seconds` after its first report, and return all that it has reported."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=write, args=(name, url, sender))
    process.start()
    sender.close()
    reported: list[str] = []
    try:
        reported.append(receiver.recv_bytes().decode())
        kill_at = time.monotonic() + after_seconds
        while (left_seconds := kill_at - time.monotonic()) > 0:
            if receiver.poll(left_seconds):
                reported.append(receiver.recv_bytes().decode())
        process.kill()
        while True:
            reported.append(receiver.recv_bytes().decode())
    except EOFError:
        return reported
    finally:
        process.join(timeout=10)
        assert process.exitcode == -signal.SIGKILL
        process.close()
        receiver.close()
