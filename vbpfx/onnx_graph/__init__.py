"""ONNX files as executable torch.fx graphs, and the way back."""
