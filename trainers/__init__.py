"""Installed into the folder that nnU-Net searches; see setup.cfg."""
