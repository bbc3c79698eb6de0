-- More minutes for one user, in each day and month until `ends_at`. An empty `token_issuer` stands for every issuer.
CREATE TABLE extensions (
    user_id      TEXT NOT NULL,
    token_issuer TEXT NOT NULL,
    minutes      BIGINT NOT NULL,
    ends_at      DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (user_id, token_issuer)
);
