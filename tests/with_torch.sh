#!/bin/sh
# The tests of ranks, and of what is private to torch, with another torch than the one that is pinned: in an environment
# of its own, which is kept for the next time (gigabytes, where no CPU build is at hand). `sh tests/with_torch.sh 2.11.0`
set -e
home=.venv-torch-$1
if [ ! -e "$home/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$home"
    "$home/bin/pip" install --quiet --disable-pip-version-check "torch==$1"
    "$home/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
    "$home/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    touch "$home/.installed"
fi
"$home/bin/python" -c 'import torch; print("torch", torch.__version__)'
exec "$home/bin/python" -m pytest -p no:cacheprovider tests/ranks tests/unit/test_compat.py tests/unit/test_step.py
