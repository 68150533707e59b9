"""Trains `clip-shapes`: a CLIP text tower, and the projections that compare its texts with the patches of `llava-shapes`."""
