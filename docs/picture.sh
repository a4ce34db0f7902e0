#!/bin/sh
# Takes the screen in the README and docs/report.png from one run of the demonstration. Look at both before you commit.
# Needs the headless browser chromium (Debian package of that name); run it from the root of the repository.
set -eu
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
OMP_NUM_THREADS=1 COLUMNS=96 "$root/.venv/bin/unstuck" demo >screen.txt 2>&1
"$root/.venv/bin/python" - "$root/README.md" <<'PYTHON'
import re
import sys
from pathlib import Path

readme = Path(sys.argv[1])
lines = [line.rstrip() for line in Path("screen.txt").read_text(encoding="utf-8").splitlines()]
verdict = next(k for k, line in enumerate(lines) if line.startswith(" demo.py"))
screen = "\n".join([*lines[:2], "…", *lines[verdict:]])
text = readme.read_text(encoding="utf-8")
readme.write_text(re.sub(r"```text\n.*?```", lambda _: f"```text\n{screen}\n```", text, flags=re.S), encoding="utf-8")
PYTHON
page=$("$root/.venv/bin/unstuck" report)
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --disable-lcd-text --virtual-time-budget=5000 \
    --force-device-scale-factor=0.75 --window-size=960,2295 \
    --screenshot="$root/docs/report.png" "file://$scratch/$page" 2>/dev/null
