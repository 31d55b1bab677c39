"""The functions that prune: models in memory, ONNX files, weight files, exported programs, and the pass for pass managers."""
