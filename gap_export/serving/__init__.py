"""Serving: requests in, answers out, as many at once as the cache has rows, and proof of what they were computed from."""
