"""voicepass: signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.

The map, in the order in which a pass goes through the modules:

    model        frozen data types: user, agent, credential, pass, limit, reservation, settlement
    errors       every refusal: code, HTTP status, text for the caller
    policy       pure rules: who may use which agent, which limits apply, which claims become variables
    passes       the use case: authenticate, allow, reserve, sign, grant, hand over
    settlement   actual usage of a conversation: webhook, reconciler as backup, lookup before a refusal
    app          the wiring: settings become services, services become the FastAPI app
    outbound     the one HTTP client, and the bounds on what it accepts
    api          HTTP in, HTTP out: routes of users and operators, schemas, problems, middleware, client.js, server
    identity     an unverified token becomes a User: every check, the credentials, the keys
    elevenlabs   all knowledge of ElevenLabs: calls, answers, the table of codes, resilience, warm store
    ledger       the only state: rules and limits, written once for SQLite and PostgreSQL
    config       settings and policy file become the parts of the service
    telemetry    an attempt or a settlement becomes a log line, metrics, a trace; logging setup
    cli          the command line: serve, demo, emulator, token, policy, reports
    doctor       why would a conversation fail? named checks, each with its remedy
    demo         service, emulator and page in one process

Beside it, `elevenlabs_emulator` is a separate package: an ElevenLabs for tests. It imports nothing of voicepass.
"""

from voicepass.app import create_app, mount
from voicepass.config.settings import Settings
from voicepass.model import User

__all__ = ["Settings", "User", "create_app", "mount"]
