#!/usr/bin/env bash
# LobRA's experiments with the 32B model: 12 tasks on 64 GPUs. Without --simulate the real jobs are run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

experiment 32B "$@"
