# Sourced by the scripts: a Python environment with this package, made on first use.
#
#   NNUNETV2_DIFFUSION_ENV=active   use the active environment as it is, install nothing
#   NNUNETV2_DIFFUSION_ENV=DIR      make and use another folder than .venv
#   PYTHON=python3.12               the Python to make it with

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# nnU-Net takes a thread for each core on a CPU; where others share the cores, threads that wait actively stop each other
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

make_environment() { # $1: what to install, "." or ".[test]"
    if [ "${NNUNETV2_DIFFUSION_ENV:-}" = active ]; then
        return
    fi
    local folder=${NNUNETV2_DIFFUSION_ENV:-$repository/.venv} python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python is $("$python" --version 2>&1), expected Python 3.10 or newer; set PYTHON" >&2
        exit 1
    fi
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    echo "installing into $folder (several GB with PyTorch on a fresh machine)"
    "$folder/bin/python" -m pip install --quiet "$repository${1#.}"
    rm -rf "$repository/build" # pip builds in the tree: a trainer that was renamed would stay in the wheel
    # a checkout of the same version may have changed since
    "$folder/bin/python" -m pip install --quiet --no-deps --force-reinstall "$repository"
    export PATH="$folder/bin:$PATH" VIRTUAL_ENV="$folder"
}

run_laboratory() { # $1: what to install, $2: module below scripts/, then its arguments; --help needs no environment
    local extra=$1 module=$2 word
    shift 2
    # the library of this checkout, also where another version is installed
    export PYTHONPATH=$repository/scripts:$repository${PYTHONPATH:+:$PYTHONPATH}
    for word in "$@"; do
        case "$word" in -h | --help) exec "${PYTHON:-python3}" -m "$module" "$@" ;; esac
    done
    make_environment "$extra"
    exec python -m "$module" "$@"
}
