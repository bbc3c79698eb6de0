"""voicepass: signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server.

The map, in reading order:

    model        the nouns: who asks, for which agent, what they are given, what is remembered of it
    errors       every refusal: code, HTTP status, public sentence
    policy       pure rules: who may use which agent, which claims become dynamic variables
    passes       the use case: authenticate, allow, get a credential, write it down, hand it over
    identity     from an unverified token to a User, every check spelled out
    keys         what a key must be before a token is verified with it
    elevenlabs   everything we know of ElevenLabs' HTTP
    ledger       the only state: which conversation was issued to whom
    observe      one attempt becomes a log line and metrics; how logging is set up
    settings     every environment variable, typed; refuses to start open
    app          the composition root
    cli          serve, demo, emulator, token
    api          HTTP in, HTTP out: routes, schemas, problems, middleware
    emulator     a pretend ElevenLabs; imports nothing of ours
    demo         service, emulator and page in one process
"""
