"""gap-export: pruned multimodal decoders to ONNX and TensorRT, with their position ids intact."""

__version__ = "0.1.0"
