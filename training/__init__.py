"""Training code of the bundled checkpoints; nothing here is imported by the package."""
