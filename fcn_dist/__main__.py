"""`python -m fcn_dist COMMAND ...`, and under the launcher `deepspeed --module fcn_dist COMMAND ...`."""

import sys

from fcn_dist.commands.entry import main

if __name__ == "__main__":
    sys.exit(main())
