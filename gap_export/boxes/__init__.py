"""Referring expressions and boxes: synthetic scenes, box codecs and frames, datasets, metrics."""
