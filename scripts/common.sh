# Sourced by every script: the project's root, its Python environment, argument checks.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

TORCH_VERSION=2.13.0

die() { # die EXIT_CODE MESSAGE...
    local code=$1
    shift
    printf '%s\n' "$@" >&2
    exit "$code"
}

say() { printf '\033[1m== %s\033[0m\n' "$*"; }

# usage MIN MAX "ARGUMENTS" "$@": splits the arguments into positional ones (the array ARGS) and,
# from the first that begins with "--", options handed on to the command (the array OPTIONS).
# --help prints the arguments and the comment at the script's beginning, which explains them.
usage() {
    local min=$1 max=$2 text=$3
    shift 3
    ARGS=()
    OPTIONS=()
    while (($#)) && [[ $1 != --* && $1 != -h ]]; do
        ARGS+=("$1")
        shift
    done
    OPTIONS=("$@")
    local line="usage: bash scripts/$(basename "$0") ${text:+$text }[--option value ...]"
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
        printf '%s\n\n' "$line"
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit 0
    fi
    if ((${#ARGS[@]} < min || ${#ARGS[@]} > max)); then
        die 2 "$line" "$(basename "$0"): ${#ARGS[@]} positional arguments, expected $min to $max"
    fi
}

find_python() { # prints the first Python of version 3.11 or newer
    local candidate
    for candidate in python3 python3.12 python3.13 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die 1 "no Python 3.11 or newer found (looked for python3, python3.11 to python3.13)"
}

environment_is_active() {
    [[ -n ${VIRTUAL_ENV-} ]] || [[ -n ${CONDA_DEFAULT_ENV-} && ${CONDA_DEFAULT_ENV-} != base ]]
}

activate_environment() { # makes .venv unless an environment is active, and activates it
    environment_is_active && return
    if [[ ! -x .venv/bin/python ]]; then
        local python
        python=$(find_python)
        say "making the virtual environment .venv with $("$python" --version)"
        "$python" -m venv .venv || die 1 "could not make .venv (on Debian and Ubuntu: install python3-venv)"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
}

install_project() { # install_project [EXTRAS]; does nothing when the same was installed before
    local extras="train${1:+,$1}" prefix stamp wanted versions=()
    prefix=$(python -c 'import sys; print(sys.prefix)')
    stamp="$prefix/.lobra-installed-$extras"
    wanted="$(cat setup.py pyproject.toml constraints.txt | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $ROOT"
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die 1 "the active environment has $(python --version); 3.11 or newer is needed"
    say "installing into $prefix"
    install_torch
    # An environment of our own gets the versions that were tested; another keeps what it has.
    [[ $prefix == "$ROOT/.venv" ]] && versions=(--constraint constraints.txt)
    python -m pip install --quiet "${versions[@]}" --editable ".[$extras]"
    printf '%s\n' "$wanted" >"$stamp"
}

install_torch() { # the CPU build on a machine without an NVIDIA GPU, where one is offered
    if python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
        return
    fi
    if ! command -v nvidia-smi >/dev/null &&
        python -m pip install --quiet "torch==$TORCH_VERSION+cpu" 2>/dev/null; then
        return
    fi
    python -m pip install --quiet "torch==$TORCH_VERSION"
}

check_options() { # check_options COMMAND [WORD...]: refuses options the command would refuse later
    python -c 'import sys; from lobra.cli import guarded, lobra_app, parsed
sys.exit(guarded(lambda: parsed(lobra_app(), sys.argv[1:]) and 0))' "$@" || exit
}

need_lobra() { # for scripts that only call the CLI: use what is installed, or install it
    if ! environment_is_active && [[ -x .venv/bin/python ]]; then
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    if ! command -v lobra >/dev/null; then
        activate_environment
        install_project
    fi
}

source_env_file() { # the ENV_FILE argument: settings of this node, also handed to the other nodes
    [[ -z ${1-} ]] && return
    [[ -f $1 ]] || die 2 "ENV_FILE $1: no such file"
    set -a
    # shellcheck disable=SC1090
    source "$1"
    set +a
}
