"""voicepass: signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.

The map, in reading order:

    model        the nouns: who asks, for which agent, what they are given, what is remembered of it
    errors       every refusal: code, HTTP status, public sentence
    policy       pure rules: who may use which agent, which claims become dynamic variables
    passes       the use case: authenticate, allow, get a credential, write it down, hand it over
    identity     from an unverified token to a User, every check of a token spelled out
    credentials  which token a request offers: header, session cookie, service token
    keys         what a key must be before a token is verified with it
    jwks         the keys that an issuer publishes: fetched, cached, rotated, outlived
    elevenlabs   everything we know of ElevenLabs' HTTP
    outbound     the HTTP client that asks it, and the bounds on what it takes in
    resilience   deadline, retry budget, breaker, bulkhead: knows no vendor
    warm         signed URLs fetched ahead of demand, each handed out once
    clocks       wall time that does not step, for the ledger's decisions
    ledger       the only state: which conversation was issued to whom
    settlement   what a conversation really used: the signed webhook, and the reconciler behind it
    readiness    the cheap named checks behind /readyz
    observe      an attempt or a settlement becomes a log line
    metrics      what Prometheus is told, of one worker or of all
    workers      the files in which workers share their metrics
    traces       an attempt becomes a trace, where the OTEL_* variables name a collector
    logs         how logging is set up, and what never gets into a line
    logwriter    one thread writes the lines; those that cannot be written are counted
    settings     every environment variable, typed
    policyfile   the policy file: agents, rules, variables, issuers
    checks       what a configured value must look like, wherever it is written
    configuration  both of them become what the service is built from, or a named contradiction
    addresses    which URLs and proxies may be trusted
    draining     from SIGTERM or SIGHUP to the end: not ready, yet serving
    app          the composition root
    server       how uvicorn is run, and the limits that ASGI cannot see
    reports      the command line over the ledger: usage, conversations, export, the off switch
    doctor       why would a conversation fail? named checks, each with its remedy
    cli          serve, demo, emulator, token, policy
    api          HTTP in, HTTP out: routes, schemas, problems, middleware, and the browser's client
    emulator     a pretend ElevenLabs; imports nothing of ours
    demo         service, emulator and page in one process
"""
