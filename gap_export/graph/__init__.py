"""Components to ONNX graphs: tracing, the cache, weights by reference, passes, and the lint that guards the ids."""
