"""PromQL for panels: series of the chosen run, by names that exist. Knows nothing of panels.

A restarted controller serves from another port, so the label `instance` changes in the middle of a run. Panels do not
tell instances apart: there is one at a time.
"""

from __future__ import annotations

from monitoring.series import PREFIX, exposed_names

_NAMES = frozenset(exposed_names())
STATES = ("waiting", "settling", "forming", "running", "finalizing", "over")


def of_run(name: str, *matchers: str) -> str:
    """The series `name` (without its prefix) of the run chosen at the top of the page."""
    return of_all(name, 'run="$run"', *matchers)


def of_all(name: str, *matchers: str) -> str:
    """The series `name` (without its prefix) of all runs. Raises KeyError when there is no such series."""
    if PREFIX + name not in _NAMES:
        raise KeyError(f"{PREFIX}{name} is no series of a run")
    return PREFIX + name + (f"{{{','.join(matchers)}}}" if matchers else "")


def now(name: str, *matchers: str) -> str:
    """The value of a gauge or counter of the chosen run, whichever controller serves it."""
    return f"max without (instance) ({of_run(name, *matchers)})"


def count(name: str) -> str:
    """A count of the chosen run, 0 where nothing was counted yet: a run has no such series before the first event."""
    return f"max by (run) ({of_run(name)}) or max by (run) ({of_run('run_info')}) * 0"


def rate(selector: str, *by: str) -> str:
    """Per second, over the time that a point of the picture stands for; summed but for the labels `by` and the run."""
    return f"sum by ({', '.join(('run', *by))}) (rate({selector}[$__rate_interval]))"


def so_far(quantile: float, name: str, *by: str) -> str:
    """A quantile of a histogram over the whole run: for what happens too seldom for a rate."""
    return f"histogram_quantile({quantile:g}, sum by ({', '.join(('le', *by))}) ({of_run(name + '_bucket')}))"


def lately(quantile: float, name: str, *by: str) -> str:
    """A quantile of a histogram over the time that a point of the picture stands for."""
    return f"histogram_quantile({quantile:g}, {rate(of_run(name + '_bucket'), 'le', *by)})"


def mean_so_far(name: str, *by: str) -> str:
    """The mean of a histogram or summary over the whole run."""
    over = f"by ({', '.join(by)}) " if by else ""
    return f"sum {over}({of_run(name + '_sum')}) / sum {over}({of_run(name + '_count')})"


def state_number() -> str:
    """The state of the run as its place in `STATES`."""
    states = (f"max({of_run('run_state', f'state={chr(34)}{state}{chr(34)}')}) == 1" for state in STATES)
    return " or ".join(f"({state}) * {number}" for number, state in enumerate(states))
