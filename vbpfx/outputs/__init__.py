"""What networks return, and how far the outputs of two networks are apart."""
