"""Latency of bundles and what it could be: `measure.py` times requests, `cost.py` says what they cost and what the machine could do,
`memory.py` how much memory one takes, `record.py` is what is stored and shown."""
