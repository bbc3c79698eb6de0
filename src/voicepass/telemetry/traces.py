"""An attempt becomes a trace: a server span, and under it one span for each step; sent by OpenTelemetry's own means.

The spans are made when the attempt is over, from what it noted: so nothing of this is in the way of a pass, and
nothing travels on to ElevenLabs. They hold no user, no credential and no text of the caller.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from voicepass.telemetry.attempt import Attempt, Step, StepName

FLUSH_SECONDS: Final = 2.0
"""The longest that a process that ends waits for the collector to take the last spans."""

_OUTBOUND: Final = set(StepName) - {StepName.VERIFY, StepName.WARM}

_log = structlog.get_logger("voicepass.telemetry.traces")


class AttemptTraces:
    """Tells `tracer` of every attempt, as a part of the trace that the caller named, if any."""

    def __init__(self, *, tracer: Tracer) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, attempt: Attempt) -> None:
        # Steps are timed by the monotonic clock, spans are dated: by what the wall clock says at this moment.
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
            self._tell(step, within, epoch)
        span.end(_nanoseconds(epoch + attempt.began + attempt.duration_seconds))

    def _tell(self, step: Step, within: Context, epoch: float) -> None:
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
async def traced() -> AsyncIterator[Sequence[Callable[[Attempt], None]]]:
    """Yield who tells attempts to the collector that the standard OTEL_* variables name: nobody where none does.

    What these variables ask for and this process cannot do is logged, and no reason not to serve.
    """
    if not _are_wanted():
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


def _are_wanted() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or (
        "otlp"
        if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        else "none"
    )
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if exporter == "none":
        return False
    if exporter == "otlp" and protocol in {None, "", "http/protobuf"}:
        return True
    _log.warning("traces.unavailable", note="traces go out by OTLP over HTTP only: OTEL_TRACES_EXPORTER=otlp")
    return False
