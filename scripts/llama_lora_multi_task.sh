#!/usr/bin/env bash
# Trains every task's adapter on a plan; the adapters are in <run>/adapters/<task>/. Without
# STRATEGY_CONFIG the plan is made first, by pruning, in a minute at most.
#
# MODEL           tiny, 7B, 13B, 32B, 70B, or the path of a Hugging Face model folder
# NUM_GPUS        GPUs there are; a plan that needs more is refused
# BUCKET_NUM      the most lengths that sequences of a step are padded to (16), if they are
# TRAIN_TASK_NUM  the first so many tasks of TRAINER_CONFIG
# MAX_SEQ_LENGTH  tokens; longer sequences are cut
# SERVER_ADDR     address of the first host (127.0.0.1 on one machine)
# SERVER_PORT     a free port there
# TRAINER_CONFIG  the tasks: a name in trainer_config/, or a path
# STRATEGY_CONFIG the plan: a name in strategy_config/, or a path
# HOST_FILE       several machines, in DeepSpeed's format: a line "name slots=8" for each
# ENV_FILE        sourced on every host before its ranks start
#
# Environment:
#   DP_BUCKET           TRUE: buckets chosen anew in every step; FALSE: LobRA's fixed ones
#   EXPR_DATA_DISPATCH  BALANCE: all replicas end together; GROUP: by length alone
# Either makes training bucketed, as --batching bucketed does; packed is the default.
#
# Options are those of `lobra train` (--help explains them), such as
#   --output-dir runs/NAME   the run's folder; by default named after TRAINER_CONFIG and the time
#   --resume                 go on from the last checkpoint of that folder
#   --device cpu             one CPU process a rank
# Where the plan is made first, --lengths, --time-limit, --memory-profile, --proposal and
# --bucket-plan go to the planner, and --time-profile, --cost-model, --gpus-per-node, --seed and
# --data-dir to both.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 8 11 "MODEL NUM_GPUS BUCKET_NUM TRAIN_TASK_NUM MAX_SEQ_LENGTH SERVER_ADDR SERVER_PORT TRAINER_CONFIG [STRATEGY_CONFIG] [HOST_FILE] [ENV_FILE]" "$@"
model=${ARGS[0]} num_gpus=${ARGS[1]} buckets=${ARGS[2]} tasks=${ARGS[3]} length=${ARGS[4]}
config=${ARGS[7]} strategy=${ARGS[8]-}
source_env_file "${ARGS[10]-}"
need_lobra

name=$(basename "$config")
for suffix in json yaml yml; do name=${name%."$suffix"}; done

planning=() training=("${OPTIONS[@]}")
if [[ -z $strategy ]]; then
    strategy="${name}_prune_${num_gpus}gpus" training=()
    for ((i = 0; i < ${#OPTIONS[@]}; i++)); do
        words=("${OPTIONS[i]}")
        [[ ${words[0]} == *=* || ${OPTIONS[i + 1]---} == --* ]] || words+=("${OPTIONS[++i]}")
        case ${words[0]%%=*} in
            --data-dir | --time-profile | --cost-model | --gpus-per-node | --seed) # of both
                planning+=("${words[@]}") training+=("${words[@]}") ;;
            --memory-profile | --lengths | --time-limit | --proposal | --bucket-plan)
                planning+=("${words[@]}") ;;
            *) training+=("${words[@]}") ;;
        esac
    done
    EXPR_DEPLOY_PATTERN=PRUNE deploy_strategy_plan --model "$model" --num-gpus "$num_gpus" \
        --num-buckets "$buckets" --num-tasks "$tasks" --max-seq-length "$length" \
        --trainer-config "$config" --strategy-config "$strategy" "${planning[@]}"
fi
output=()
if [[ " ${training[*]-} " != *" --output-dir"[\ =]* ]]; then
    output=(--output-dir "runs/${name}_$(date +%Y%m%d_%H%M%S)")
fi
exec lobra train --model "$model" --trainer-config "$config" --strategy-config "$strategy" \
    --num-gpus "$num_gpus" --num-tasks "$tasks" --num-buckets "$buckets" \
    --max-seq-length "$length" --server-addr "${ARGS[5]}" --server-port "${ARGS[6]}" \
    ${ARGS[9]:+--host-file "${ARGS[9]}"} ${ARGS[10]:+--env-file "${ARGS[10]}"} \
    "${output[@]}" "${training[@]}"
