"""Runs a bundle: preprocessing, prompts, the session contract, and the one decode loop."""
