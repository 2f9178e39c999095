"""Where the processes of a run are, on whatever node."""

from __future__ import annotations

import os
import sys

import ray


def go_to(directory: str | None) -> None:
    """Makes relative paths and the job's own modules be found; None: Ray has put this process where they are."""
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise ValueError(
                f"{directory}, where the run was started, cannot be entered on node {ray.util.get_node_ip_address()}: "
                f"{error.strerror}; submit the job with its files (`orchestrator submit`), or start it in a directory "
                "that every node has"
            ) from error
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
