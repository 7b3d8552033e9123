"""The converters as ``python -m nnunetv2_diffusion.datasets``."""

from nnunetv2_diffusion.datasets.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
