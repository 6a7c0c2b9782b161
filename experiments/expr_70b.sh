#!/usr/bin/env bash
# LobRA's experiments with Llama2-70B: 12 tasks on 64 GPUs, and scalability. Without --simulate the real jobs are run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

experiment 70B "$@"
