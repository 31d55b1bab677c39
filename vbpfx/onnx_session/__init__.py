"""ONNX files run in ONNX Runtime."""
