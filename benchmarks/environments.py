"""Virtual environments of their own for peers that are no dependency of ours, made when they are first wanted.

They are kept under `$BENCHMARK_ENVIRONMENTS`, or else in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import site
import subprocess
import sys
from pathlib import Path


def python_with(*requirements: str, sees_ours: bool = False) -> Path:
    """The interpreter of an environment in which these requirements (name==version) are installed. With `sees_ours` it
    has this environment's packages as well, of the same versions, where it has none of its own.

    Raises subprocess.CalledProcessError when they cannot be installed.
    """
    home = Path(os.environ.get("BENCHMARK_ENVIRONMENTS") or Path.home() / ".cache" / "orchestrator-benchmarks")
    ours = site.getsitepackages() if sees_ours else []
    name = hashlib.sha256(repr((sys.version, sorted(requirements), ours)).encode()).hexdigest()[:16]
    directory = home / name
    python, complete = directory / "bin" / "python", directory / "complete"
    if not complete.exists():
        print(f"installing {', '.join(requirements)} in {directory}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        if ours:
            places = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
            # Behind its own packages, and so only for what it lacks.
            (Path(places.strip()) / "ours.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade-strategy", "only-if-needed",
                        *requirements], check=True, stdout=sys.stderr)  # fmt: skip
        complete.touch()
    return python
