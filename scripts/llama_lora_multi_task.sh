#!/usr/bin/env bash
# Trains every task's adapter on a plan. Without STRATEGY_CONFIG the plan is made first, by pruning,
# in a minute at most (--time-limit SECONDS); options of planning are handed to it.
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
