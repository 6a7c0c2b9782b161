#!/usr/bin/env bash
# Measures the time of one layer, forward and backward with LoRA, per tensor-parallel degree.
# Writes exp_result/profile/cost_model/profile_time_<model>.csv; an interrupted run continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 2 6 "MODEL TP_LIST [SERVER_ADDR] [SERVER_PORT] [HOST_FILE] [ENV_FILE]" "$@"
source_env_file "${ARGS[5]-}"
need_lobra
exec lobra profile time --model "${ARGS[0]}" --tp "${ARGS[1]}" \
    ${ARGS[4]:+--host-file "${ARGS[4]}"} "${OPTIONS[@]}"
