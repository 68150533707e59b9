"""The engine over HTTP: endpoints, what they take and give, keys and limits."""
