"""Import ONNX files as executable torch.fx graphs, and write narrowed graphs back to ONNX files."""
