"""The modules that are traced: towers, splice, decoders, on the seams that exports need."""
