#!/usr/bin/env bash
# Measures the time of one layer, forward and backward with LoRA, per tensor-parallel size, and that
# of embedding and head. Writes exp_result/profile/cost_model/profile_time_<model>.csv and others
# beside it; the same command goes on where it was interrupted.
#
# MODEL           tiny, 7B, 13B, 32B, 70B, or the path of a Hugging Face model folder
# TP_LIST         tensor-parallel sizes with commas between, such as 1,2,4,8; each is measured by as
#                 many processes or GPUs
# SERVER_ADDR     not needed; LobRA's script has it
# SERVER_PORT     the same
# HOST_FILE       not needed; may name this machine only, where all is measured
# ENV_FILE        sourced first: settings of this machine, such as CUDA_VISIBLE_DEVICES=0,1
#
# Options are those of `lobra profile time` (--help explains them), such as
#   --quick                               a first look, in a fraction of the time
#   --trainer-config NAME                 with the adapters of these tasks
#   --estimate --accelerator H200-141GB   estimate, without running anything
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 2 6 "MODEL TP_LIST [SERVER_ADDR] [SERVER_PORT] [HOST_FILE] [ENV_FILE]" "$@"
source_env_file "${ARGS[5]-}"
need_lobra
exec lobra profile time --model "${ARGS[0]}" --tp "${ARGS[1]}" \
    ${ARGS[4]:+--host-file "${ARGS[4]}"} "${OPTIONS[@]}"
