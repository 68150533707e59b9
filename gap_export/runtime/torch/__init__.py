"""The PyTorch reference as a session."""
