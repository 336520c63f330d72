"""One measurement in a process of its own: `one.py MODULE:FUNCTION OPTIONS RESULT` calls it and writes what it returns.

The module must stay as small as it is: processes that a contender starts import it again, within the time that is
measured.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    figures = getattr(import_module(module), function)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(figures))
