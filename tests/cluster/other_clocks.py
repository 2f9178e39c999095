"""Clocks that are wrong: a `sitecustomize` for every Python process of a run, on its PYTHONPATH.

The wall clock is ahead by what a file says, which may change at any time. With `apart`, every process that Ray starts
(controller and workers) has clocks of its own besides, as on several machines: wall and monotonic, hours apart.
"""

from __future__ import annotations

from pathlib import Path

_CODE = """
import os, sys, time

OFFSET, CLAIMS = {offset!r}, {claims!r}
wall, steady = time.time, time.monotonic
mine = 0

if CLAIMS and any("default_worker.py" in word for word in sys.orig_argv):
    while True:
        mine += 1
        try:
            os.close(os.open(os.path.join(CLAIMS, str(mine)), os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            pass

def ahead():
    try:
        with open(OFFSET) as file:
            return float(file.read() or 0.0)
    except (OSError, ValueError):
        return 0.0

known = [0.0, 0.0]

def wrong_wall():
    now = steady()
    if now - known[0] > 0.02:
        known[:] = now, ahead()
    return wall() + known[1] + 5000.0 * mine * (-1) ** mine

time.time = wrong_wall
time.time_ns = lambda: int(wrong_wall() * 1e9)
if mine:
    time.monotonic = lambda: steady() + 70000.0 * mine
    import monitoring.clock
    monitoring.clock.this_boot = lambda: f"boot {{mine}}"
"""


class OtherClocks:
    """Goes into `environment` of what is started."""

    def __init__(self, home: Path, *, apart: bool = False) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._offset = home / "offset"
        self.claims = home / "claims"
        self.claims.mkdir()
        code = _CODE.format(offset=str(self._offset), claims=str(self.claims) if apart else "")
        (home / "sitecustomize.py").write_text(code)
        self.environment = {"PYTHONPATH": str(home)}

    def jump_to(self, seconds: float) -> None:
        """The wall clock is so far ahead from now on."""
        draft = self._offset.with_suffix(".draft")
        draft.write_text(str(seconds))
        draft.replace(self._offset)
