-- What one instance at a time may do, and until when it is somebody's.
CREATE TABLE leases (
    name       TEXT PRIMARY KEY,
    held_until DOUBLE PRECISION NOT NULL
);
