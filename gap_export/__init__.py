"""gap-export: pruned multimodal decoders to ONNX and TensorRT, with their position ids intact."""

import time

__version__ = "0.1.0"

IMPORTED_NS = time.time_ns()
"""When this process began to read the package: whether a source that was changed later is what runs is not known."""
