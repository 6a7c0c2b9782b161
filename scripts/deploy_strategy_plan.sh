#!/usr/bin/env bash
# Chooses how many replicas of which layouts <tp,pp> to deploy; writes
# strategy_config/<STRATEGY_CONFIG>.yaml. Needs no GPU.
#
# MODEL           tiny, 7B, 13B, 32B, 70B, or the path of a Hugging Face model folder
# NUM_GPUS_LIMIT  GPUs to plan for
# BUCKET_NUM      the most lengths that sequences of a step are padded to (16); of no consequence where
#                 steps are packed, that is, sequences laid end to end
# TRAIN_TASK_NUM  the first so many tasks of TRAINER_CONFIG
# MAX_SEQ_LENGTH  tokens; longer sequences are cut
# TRAINER_CONFIG  the tasks: a name in trainer_config/, or a path
# STRATEGY_CONFIG the plan's name in strategy_config/, or a path
#
# Environment:
#   EXPR_DEPLOY_PATTERN   EXACT (default), BALANCE, GROUP or PRUNE: the planner
#   EXPR_SCHEME_PROPOSAL  ON: only layouts LobRA would propose; OFF: all; by default OFF with EXACT
#   BUCKET_PLAN           DYNAMIC (default): the best buckets; STATIC: fixed ones
#
# Options are those of `lobra plan` (--help explains them), such as
#   --lengths FILE        sequence lengths instead of data sets, or "published"
#   --time-limit SECONDS  of the search
#   --json, --dry-run     for programs; write no plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 7 7 "MODEL NUM_GPUS_LIMIT BUCKET_NUM TRAIN_TASK_NUM MAX_SEQ_LENGTH TRAINER_CONFIG STRATEGY_CONFIG" "$@"
need_lobra
exec deploy_strategy_plan --model "${ARGS[0]}" --num-gpus "${ARGS[1]}" --num-buckets "${ARGS[2]}" \
    --num-tasks "${ARGS[3]}" --max-seq-length "${ARGS[4]}" --trainer-config "${ARGS[5]}" \
    --strategy-config "${ARGS[6]}" "${OPTIONS[@]}"
