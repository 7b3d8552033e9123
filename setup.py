"""Editable installs leave out what only works as a copy; all else is in setup.cfg."""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

PRESETS = "nnunetv2_diffusion.presets"  # read from plans/presets of the checkout


class EditableWheel(editable_wheel):
    """``pip install -e .``: without the modules that go into nnU-Net's folders.

    nnU-Net searches folders, so it would not see them; but Python would take them for the package nnunetv2 itself,
    and hide an nnunetv2 that is an editable install as well. ``nnUNet_extTrainer`` finds the trainers then.
    """

    def run(self) -> None:
        """Build the wheel."""
        names = [name for name in self.distribution.packages if not name.startswith("nnunetv2.") and name != PRESETS]
        self.distribution.packages = names
        self.distribution.package_dir = {name: name.replace(".", "/") for name in names}
        super().run()


setup(cmdclass={"editable_wheel": EditableWheel})
