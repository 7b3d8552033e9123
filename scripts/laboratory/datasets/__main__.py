"""The converters as ``python -m laboratory.datasets``."""

from laboratory.datasets.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
