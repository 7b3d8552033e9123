"""The main job from data to a scored mask, through nnU-Net's own commands."""
