"""Checkpoint to bundle, in stages."""
