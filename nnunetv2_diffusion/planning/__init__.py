"""Settings in nnU-Net's plans."""
