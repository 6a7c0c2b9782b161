#!/usr/bin/env bash
# Chooses which replicas of which layouts to deploy; writes strategy_config/<STRATEGY_CONFIG>.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 7 7 "MODEL NUM_GPUS_LIMIT BUCKET_NUM TRAIN_TASK_NUM MAX_SEQ_LENGTH TRAINER_CONFIG STRATEGY_CONFIG" "$@"
need_lobra
exec deploy_strategy_plan --model "${ARGS[0]}" --num-gpus "${ARGS[1]}" --num-buckets "${ARGS[2]}" \
    --num-tasks "${ARGS[3]}" --max-seq-length "${ARGS[4]}" --trainer-config "${ARGS[5]}" \
    --strategy-config "${ARGS[6]}" "${OPTIONS[@]}"
