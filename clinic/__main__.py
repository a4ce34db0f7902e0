"""python -m clinic is the scoreboard: see clinic.score."""

import sys

from clinic.score import main

if __name__ == "__main__":
    sys.exit(main())
