"""Images and expressions on their way to arrays."""
