"""Prints the page of all settings."""

from nnunetv2_diffusion.settings.reference import settings_page

print(settings_page(), end="")
