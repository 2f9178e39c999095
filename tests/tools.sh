#!/bin/sh
# Debian's chromium and chromium-driver, for tests/browser, where they are missing and can be installed.
# (Prometheus is unpacked by the tests that use it: its package would start a service.)
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    install() { apt-get install --yes --no-install-recommends chromium chromium-driver fonts-dejavu-core >"$log" 2>&1; }
    if install || { apt-get update >/dev/null 2>&1 && install; }; then
        rm -f "$log"
        exit 0
    fi
    tail -n 3 "$log" >&2
    rm -f "$log"
fi
echo "tests/browser will be skipped: install chromium and chromium-driver to run them" >&2
