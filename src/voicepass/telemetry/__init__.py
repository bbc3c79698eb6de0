"""What operators see of a pass: log lines, metrics, traces, and the set-up of logging."""
