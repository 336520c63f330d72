#!/usr/bin/env bash
# The check command: format, lint, types and tests, in an environment it makes itself.
#   bash tests/run.sh            all tests but those marked slow
#   bash tests/run.sh --slow     all tests
# Further arguments go to pytest: bash tests/run.sh -k stream
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=test . launch/environment.sh

ruff format --check .
ruff check .
mypy
# Of the slow tests most wait half of the time, for processes that start or come to their end: two at a time.
case " $* " in *" --slow "*) set -- --numprocesses 2 --dist loadfile "$@" ;; esac
exec python -m pytest "$@"
