#!/usr/bin/env bash
# Measures, for every layout <tp,pp> within NUM_GPUS_LIMIT, how many tokens a micro-batch may hold.
# Writes exp_result/profile/memory/max_tokens_<model>_<n>tasks.csv; an interrupted run continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 5 9 "MODEL NUM_GPUS_LIMIT TRAIN_TASK_NUM TRAINER_CONFIG MAX_SEQ_LENGTH [SERVER_ADDR] [SERVER_PORT] [HOST_FILE] [ENV_FILE]" "$@"
source_env_file "${ARGS[8]-}"
need_lobra
exec lobra profile memory --model "${ARGS[0]}" --num-gpus "${ARGS[1]}" --num-tasks "${ARGS[2]}" \
    --trainer-config "${ARGS[3]}" --max-seq-length "${ARGS[4]}" \
    ${ARGS[7]:+--host-file "${ARGS[7]}"} "${OPTIONS[@]}"
