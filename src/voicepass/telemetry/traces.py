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
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from voicepass.telemetry.attempt import Attempt, Step, StepName
from voicepass.telemetry.logger import Logger

FLUSH_SECONDS: Final = 2.0  # the longest that a process waits at its end for the collector to receive the last spans

_log = Logger("voicepass.telemetry.traces")


class AttemptTraces:
    """Makes the spans of an attempt, in the trace that the caller named, if any."""

    def __init__(self, *, tracer: Tracer) -> None:
        self._tracer = tracer

    def __call__(self, attempt: Attempt) -> None:
        carrier = {"traceparent": attempt.request.traceparent or ""}
        parent = TraceContextTextMapPropagator().extract(carrier, context=Context())
        attributes = {
            "voicepass.request_id": attempt.request.request_id,
            "voicepass.transport": attempt.request.transport.value,
            "voicepass.agent": attempt.alias or "",
            "voicepass.outcome": attempt.outcome,
            "voicepass.conversation_id": attempt.conversation_id or "",
        }
        error = attempt.outcome if attempt.is_operators_fault else None
        options = {"context": parent, "kind": SpanKind.SERVER, "attributes": attributes}
        within = set_span_in_context(self._add_span("issue a pass", attempt, error=error, **options), parent)
        for step in attempt.steps:
            kind = SpanKind.INTERNAL if step.name is StepName.VERIFY else SpanKind.CLIENT
            self._add_span(step.name, step, error="" if step.has_failed else None, context=within, kind=kind)

    def _add_span(self, name: str, part: Attempt | Step, *, error: str | None, **options: Any) -> Span:  # noqa: ANN401
        began = time.time() - time.monotonic() + part.began  # spans need dates
        span = self._tracer.start_span(name, start_time=int(began * 1e9), **options)
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(int((began + part.seconds) * 1e9))
        return span


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
