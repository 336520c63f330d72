# Sourced by quickstart.sh and tests/run.sh: makes the environment in .venv, or takes the one that is there.
# Needs Python 3.11 or newer and a C++ compiler (DeepSpeed builds its CPU communication with it).
# PYTHON=... chooses the interpreter. EXTRAS=... names the package's extras to install (default: train,report).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usual=train,report
extras=${EXTRAS:-$usual}
python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: no Python 3.11 or newer found; install it, or name it with PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "error: no C++ compiler found; DeepSpeed needs one; install g++" >&2
    exit 2
fi

wanted="$(cksum <"$root/setup.cfg") $("$python" -V 2>&1)"
stamp=$root/.venv/installed-$extras
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $root/.venv (once; some minutes)"
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    pip="$root/.venv/bin/python -m pip --disable-pip-version-check --quiet --quiet"
    torch=$(sed -n 's/^ *\(torch==.*\)$/\1/p' "$root/setup.cfg")
    $pip install --upgrade pip setuptools wheel ninja
    # Torch first, and the build that fits the machine: uv finds the CUDA build for its driver, or the CPU build where
    # there is no GPU. Where uv cannot reach torch's own index, pip's answer works too, if larger.
    if ! "$root/.venv/bin/python" -c 'import torch' 2>/dev/null; then
        { $pip install uv &&
            "$root/.venv/bin/uv" pip install --quiet --python "$root/.venv/bin/python" --torch-backend=auto "$torch" \
                2>/dev/null; } || $pip install "$torch"
    fi
    # DeepSpeed's build looks for torch, so it must not be built in isolation from it.
    $pip install --no-build-isolation --editable "$root[$extras]"
    echo "$wanted" | tee "$stamp" >"$root/.venv/installed-$usual" # every other extra that is installed here has these
fi
# shellcheck disable=SC1091
. "$root/.venv/bin/activate"
