"""Whether this Python can run the laboratory."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "nnunetv2")


def need_environment(script: str) -> None:
    """Return where the laboratory can run; else go on in the environment that ``_environment.sh`` makes, if it exists.

    Raises:
        SystemExit: with a line that says what to do.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    folder = Path(os.environ.get("NNUNETV2_DIFFUSION_ENV") or CHECKOUT / ".venv")
    own = folder / "bin" / "python"
    if own.is_file() and Path(sys.prefix) != folder:
        os.execv(own, [str(own), *sys.argv])
    raise SystemExit(
        f"{script}: {' and '.join(missing)} not found by {sys.executable}; run `{sys.executable} -m pip install "
        f"{CHECKOUT}` in an environment of yours, or scripts/demo once, which makes {folder}"
    )
