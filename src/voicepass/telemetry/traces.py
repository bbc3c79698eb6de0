"""Makes a trace of each attempt: a server span, and under it one span for each step. OpenTelemetry sends them.

The spans are made after the attempt, from its facts. So they delay no pass, and ElevenLabs gets no trace header.
They hold no user, no credential and no text of the caller.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from voicepass.telemetry.attempt import Attempt, Step, StepName
from voicepass.telemetry.logger import Logger

FLUSH_SECONDS: Final = 2.0
"""The longest that a process waits at its end for the collector to receive the last spans."""

_OUTBOUND: Final = set(StepName) - {StepName.VERIFY}

_log = Logger("voicepass.telemetry.traces")


class AttemptTraces:
    """Makes the spans of an attempt, in the trace that the caller named, if any."""

    def __init__(self, *, tracer: Tracer) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, attempt: Attempt) -> None:
        # Steps have monotonic times, and spans need dates: this converts one to the other.
        epoch = time.time() - time.monotonic()
        parent = Context()
        if attempt.traceparent is not None:
            parent = self._propagator.extract({"traceparent": attempt.traceparent}, context=parent)
        span = self._tracer.start_span(
            "issue a pass",
            context=parent,
            kind=SpanKind.SERVER,
            attributes={
                "voicepass.request_id": attempt.request_id,
                "voicepass.transport": attempt.transport.value,
                "voicepass.agent": attempt.alias if attempt.agent else "",
                "voicepass.outcome": attempt.outcome,
                "voicepass.conversation_id": attempt.conversation_id or "",
            },
            start_time=_nanoseconds(epoch + attempt.began),
        )
        if attempt.is_operators_fault:
            span.set_status(Status(StatusCode.ERROR, attempt.outcome))
        within = set_span_in_context(span, parent)
        for step in attempt.steps:
            self._add_step(step, within, epoch)
        span.end(_nanoseconds(epoch + attempt.began + attempt.duration_seconds))

    def _add_step(self, step: Step, within: Context, epoch: float) -> None:
        kind = SpanKind.CLIENT if step.name in _OUTBOUND else SpanKind.INTERNAL
        span = self._tracer.start_span(
            step.name, context=within, kind=kind, start_time=_nanoseconds(epoch + step.began)
        )
        if step.has_failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(epoch + step.began + step.seconds))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


@asynccontextmanager
async def open_tracing() -> AsyncIterator[Sequence[Callable[[Attempt], None]]]:
    """Yield an observer that sends attempts to the collector of the standard OTEL_* variables, or none without them.

    If the variables ask for something that this process cannot do, it logs a warning and serves without traces.
    """
    if not _is_requested():
        yield []
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        _log.warning("traces.unavailable", note="OTEL_* asks for traces: install the extra 'traces', or unset it")
        yield []
        return
    resource = Resource.create({"service.name": "voicepass"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield [AttemptTraces(tracer=provider.get_tracer("voicepass"))]
    finally:
        flush = threading.Thread(target=provider.shutdown, daemon=True)  # it may wait 30 s for a dead collector
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_SECONDS)


def _is_requested() -> bool:
    read = os.environ.get
    has_endpoint = read("OTEL_EXPORTER_OTLP_ENDPOINT") or read("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    exporter = read("OTEL_TRACES_EXPORTER") or ("otlp" if has_endpoint else "none")
    protocol = read("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or read("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if exporter == "none" or read("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if (exporter, protocol) == ("otlp", "http/protobuf"):
        return True
    _log.warning("traces.unavailable", note="voicepass sends traces only by OTLP over HTTP: OTEL_TRACES_EXPORTER=otlp")
    return False
