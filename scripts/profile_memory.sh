#!/usr/bin/env bash
# Finds, for every layout <tp,pp> (tensor-parallel size, pipeline stages) within NUM_GPUS_LIMIT, how
# many tokens a micro-batch may hold. Writes exp_result/profile/memory/max_tokens_<model>_<n>tasks.csv;
# the same command goes on where it was interrupted.
#
# MODEL           tiny, 7B, 13B, 32B, 70B, or the path of a Hugging Face model folder
# NUM_GPUS_LIMIT  the most GPUs of a layout
# TRAIN_TASK_NUM  adapters trained together: the first so many tasks of TRAINER_CONFIG
# TRAINER_CONFIG  the tasks: a name in trainer_config/, or a path
# MAX_SEQ_LENGTH  tokens to try up to, rounded up to a multiple of 256
# SERVER_ADDR     not needed; LobRA's script has it
# SERVER_PORT     the same
# HOST_FILE       not needed; may name this machine only, where all is measured
# ENV_FILE        sourced first: settings of this machine, such as CUDA_VISIBLE_DEVICES=0,1
#
# Options are those of `lobra profile memory` (--help explains them), such as
#   --memory-budget 84MB                  of one rank; by default 90 % of a GPU's memory, or this
#                                         machine's free memory shared by the ranks
#   --estimate --accelerator H200-141GB   estimate, without running anything
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 5 9 "MODEL NUM_GPUS_LIMIT TRAIN_TASK_NUM TRAINER_CONFIG MAX_SEQ_LENGTH [SERVER_ADDR] [SERVER_PORT] [HOST_FILE] [ENV_FILE]" "$@"
source_env_file "${ARGS[8]-}"
need_lobra
exec lobra profile memory --model "${ARGS[0]}" --num-gpus "${ARGS[1]}" --num-tasks "${ARGS[2]}" \
    --trainer-config "${ARGS[3]}" --max-seq-length "${ARGS[4]}" \
    ${ARGS[7]:+--host-file "${ARGS[7]}"} "${OPTIONS[@]}"
