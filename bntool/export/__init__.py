"""From a model to an ONNX file."""
