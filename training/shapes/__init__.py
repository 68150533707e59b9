"""Trains `llava-shapes`, the small LLaVA checkpoint that ships with the package, from nothing."""
