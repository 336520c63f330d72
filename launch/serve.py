#!/usr/bin/env python3
"""`python launch/serve.py --help`; the command itself is fcn_dist/commands/serve.py."""

import sys
from pathlib import Path

# A checkout's scripts run the checkout's code, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fcn_dist.commands.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("serve"))
