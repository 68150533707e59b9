"""Latency of bundles, and what it could be.

`bench.py` is the whole of it as one call. `candidate.py` makes a request, `measure.py` times it, `cost.py` says what it costs and what the
machine could do, `record.py` is what is stored, `show.py` what is shown.
"""
