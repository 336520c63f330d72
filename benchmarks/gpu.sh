#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, with the torch that is installed and no network:
#   bash benchmarks/gpu.sh OUT                    tests marked gpu, and the benchmarks; writes OUT/gpu.json and gpu.md
#   bash benchmarks/gpu.sh OUT --wheels DIR       other packages from DIR/*.whl, into a folder of their own
#   bash benchmarks/gpu.sh OUT --check            without a GPU: whether this command itself works
# PYTHON names the interpreter. Exit code: 0, 1 if a part failed, 2 if there is no CUDA device.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
