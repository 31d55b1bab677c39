"""Every way in, side by side: models, ONNX files, weight files, exported programs, and the pass for pass managers."""
