CREATE TABLE grants (
    request_id        TEXT    NOT NULL,
    granted_at        REAL    NOT NULL,  -- seconds since the epoch
    token_issuer      TEXT    NOT NULL,
    user_id           TEXT    NOT NULL,  -- exact, as the issuer wrote it: (token_issuer, user_id) is one person
    agent_alias       TEXT    NOT NULL,
    agent_id          TEXT    NOT NULL,
    transport         TEXT    NOT NULL CHECK (transport IN ('websocket', 'webrtc')),
    conversation_id   TEXT,              -- NULL where the vendor named none
    credential_sha256 TEXT    NOT NULL,
    expires_at        REAL
) STRICT;

CREATE INDEX grants_by_conversation ON grants (conversation_id);
