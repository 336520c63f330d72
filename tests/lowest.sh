#!/usr/bin/env bash
# Tests in an environment with every requirement of setup.cfg at its lowest version, or, with --newest, at its newest.
#   bash tests/lowest.sh [--newest] FOLDER [arguments of pytest]
# The environment is made in FOLDER, a new one. Torch is at the version that setup.cfg states either way.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
resolution=lowest-direct
if [ "${1:-}" = --newest ]; then
    resolution=highest
    shift
fi
folder=${1:?a folder for the environment is needed}
shift
python=${PYTHON:-python3.11}
[ -e "$folder" ] && { echo "error: $folder exists; name a new folder" >&2; exit 2; }

"$python" -m venv "$folder"
python=$folder/bin/python
"$python" -m pip --quiet install uv
# DeepSpeed's build looks for torch. pip knows its own settings, where to find it, as launch/environment.sh does.
"$python" -m pip --quiet install setuptools wheel ninja "$(sed -n 's/^ *\(torch==.*\)$/\1/p' setup.cfg)"
"$folder/bin/uv" pip install --quiet --python "$python" --resolution "$resolution" --no-build-isolation --editable '.[test]'
"$folder/bin/uv" pip list --quiet --python "$python"
exec "$python" -m pytest "$@"
