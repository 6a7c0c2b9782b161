#!/usr/bin/env bash
# Makes the environment if none is active, installs what the tests need, runs the test suite.
# usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

activate_environment
install_project dev
exec python -m pytest "$@"
