#!/usr/bin/env bash
# LobRA's experiments with Llama2-7B: 6 tasks on 16 GPUs. Without --simulate the real jobs are run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

experiment 7B "$@"
