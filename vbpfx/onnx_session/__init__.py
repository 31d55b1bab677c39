"""Run ONNX files in ONNX Runtime."""
