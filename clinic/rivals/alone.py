"""The training of a cell as a script, for a tool that is a command."""

import json
import sys
from pathlib import Path

from clinic.cells import Case
from clinic.rivals.cell import prepared, timed

if __name__ == "__main__":
    timed(prepared(Case(**json.loads(sys.argv[1]))), Path.cwd())
