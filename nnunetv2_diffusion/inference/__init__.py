"""Prediction beyond what stock nnU-Net gives: samples, uncertainty, masks of every reverse step."""
