"""The time of each part of a pass alone: the token, the rules, the ledger, the answer, the log line, the trace."""

import asyncio
import time
import uuid
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ports import InstantProvider
from tests.conftest import MakeToken, make_token, settings_with
from tests.telemetry.test_metrics import FakeLedger, Process, make_metrics
from voicepass.api.schemas import SignedUrlPass
from voicepass.config.build import Configuration, configure
from voicepass.config.limits import MAX_AMOUNT, LimitTables, UserLimitsEntry
from voicepass.identity import JwtAuthenticator
from voicepass.ledger import Ledger
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Credentials, PassRequest, Reservation, Transport, User, VoicePass
from voicepass.telemetry.attempt import Attempt, StepName
from voicepass.telemetry.lines import log_attempt
from voicepass.telemetry.logs import configure_logging
from voicepass.telemetry.traces import AttemptTraces

__all__ = ["make_token"]  # a fixture of the tests

Result = TypeVar("Result")

LIMITS = LimitTables(user=UserLimitsEntry(**dict.fromkeys(UserLimitsEntry.model_fields, MAX_AMOUNT))).limits()


@dataclass(frozen=True)
class OnDisk:
    """A ledger in a file, and the event loop that runs it."""

    ledger: Ledger
    loop: asyncio.AbstractEventLoop


@pytest.fixture
def configuration() -> Configuration:
    return configure(settings_with())


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[OnDisk]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        opened = open_sqlite(str(tmp_path / "ledger.db"), clock=time.time)
        yield OnDisk(runner.run(opened.__aenter__()), runner.get_loop())
        runner.run(opened.__aexit__(None, None, None))


@pytest.fixture
def user() -> User:
    return User(issuer="https://login.example", id="u-1", name="Ada", claims={})


def run_without_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that waits for nothing, without the cost of an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("the coroutine waited for something")


def test_verify_a_token(benchmark: BenchmarkFixture, configuration: Configuration, make_token: MakeToken) -> None:
    authenticator = JwtAuthenticator(trusted=configuration.trusted, clock=time.time)
    credentials = Credentials(authorization=(f"Bearer {make_token()}",))

    user = benchmark(lambda: run_without_loop(authenticator.authenticate(credentials)))

    assert user.id == "u-1"


def test_apply_the_policy(benchmark: BenchmarkFixture, configuration: Configuration, user: User) -> None:
    policy = configuration.policy

    variables = benchmark(lambda: policy.variables_for(user, policy.agent_for(user, "default")))

    assert variables == {"user_id": "u-1", "user_name": "Ada"}


def test_reserve_and_grant_on_disk(benchmark: BenchmarkFixture, on_disk: OnDisk) -> None:
    async def issue() -> None:
        reservation = Reservation(
            pass_id=uuid.uuid4().hex,
            request_id="r",
            token_issuer="https://login.example",
            user_id=uuid.uuid4().hex,
            agent_alias="default",
            agent_id="agent_1",
            transport=Transport.WEBSOCKET,
            seconds=600,
        )
        credential = await InstantProvider().fetch_credential(configuration_agent, Transport.WEBSOCKET)
        await on_disk.ledger.reserve(reservation, LIMITS)
        await on_disk.ledger.grant(reservation, credential)

    configuration_agent = configure(settings_with()).policy.agents["default"].agent
    benchmark(lambda: on_disk.loop.run_until_complete(issue()))


def test_encode_the_answer(benchmark: BenchmarkFixture, configuration: Configuration, user: User) -> None:
    agent = configuration.policy.agents["default"].agent
    voice_pass = VoicePass(
        transport=Transport.WEBSOCKET,
        credential=run_without_loop(InstantProvider().fetch_credential(agent, Transport.WEBSOCKET)),
        agent=agent,
        user_id=user.id,
        dynamic_variables=configuration.policy.variables_for(user, agent),
    )

    answer = benchmark(lambda: SignedUrlPass.of(voice_pass).model_dump_json())

    assert voice_pass.credential.secret in answer


@pytest.fixture
def attempt(configuration: Configuration, user: User) -> Attempt:
    credentials, transport = Credentials(), Transport.WEBSOCKET
    attempt = Attempt(
        PassRequest(request_id="r", credentials=credentials, alias="default", transport=transport, client="127.0.0.1")
    )
    attempt.user, attempt.agent = user, configuration.policy.agents["default"].agent
    attempt.outcome, attempt.conversation_id = "granted", "conv_1"
    for name in (StepName.VERIFY, StepName.RESERVE, StepName.UPSTREAM, StepName.GRANT):
        with attempt.step(name):
            pass
    return attempt


def test_log_and_count(benchmark: BenchmarkFixture, attempt: Attempt) -> None:
    configure_logging(log_format="json", level="info")
    observers = (log_attempt, make_metrics(Process(), FakeLedger(), aliases=["", "default"]).count_attempt)

    benchmark(lambda: [observe(attempt) for observe in observers])


def test_trace(benchmark: BenchmarkFixture, attempt: Attempt) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    record = AttemptTraces(tracer=provider.get_tracer("voicepass"))

    benchmark(lambda: record(attempt))

    provider.shutdown()
