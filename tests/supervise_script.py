"""supervise_script.py RANKS GRACE SCRIPT ARGUMENTS...: the supervisor around any script."""

import sys

from fcn_dist.launching.supervise import Launch, supervise

if __name__ == "__main__":
    ranks, grace, *script = sys.argv[1:]
    sys.exit(supervise(Launch(arguments=script, ranks=int(ranks), grace=float(grace))))
