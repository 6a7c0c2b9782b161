#!/usr/bin/env bash
# Makes the environment if none is active, installs what the tests need, runs the test suite.
# usage: bash scripts/test.sh [--all] [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    printf '%s\n' "usage: bash scripts/test.sh [--all] [pytest arguments, such as -k planner or tests/model]" \
        "  --all  the long tests too, and more examples of every property (docs/testing.md)"
    exit 0
fi

activate_environment
install_project serve,quantised,dev
exec python -m pytest "$@"
