#!/bin/sh
# Takes docs/report.png, the picture in the README: the top of the report that `make demo` writes.
# Needs the headless browser chromium (Debian package of that name); run it from the root of the repository.
set -eu
unstuck="$PWD/.venv/bin/unstuck"
picture="$PWD/docs/report.png"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
"$unstuck" demo >/dev/null 2>&1
page=$("$unstuck" report)
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --disable-lcd-text --virtual-time-budget=5000 \
    --force-device-scale-factor=0.75 --window-size=960,2350 --screenshot="$picture" "file://$scratch/$page" 2>/dev/null
