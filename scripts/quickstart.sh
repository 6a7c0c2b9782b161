#!/usr/bin/env bash
# Profile -> plan -> train -> report on this machine, with nothing but Python 3.11 or newer there to
# begin with: makes an environment (.venv) if none is active, installs the project, and trains four
# adapters on a small Llama with text mined from the Python standard library. On four GPUs if there
# are so many, else on the CPU.
#
# Options are those of `lobra train`, such as --max-steps 10.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 0 0 "" "$@"
MODEL=tiny CONFIG=quickstart PLAN=quickstart RUN=runs/quickstart
NUM_TASKS=4 NUM_BUCKETS=16 MAX_SEQ_LENGTH=2048 NUM_RANKS=4 LARGEST_LAYOUT=2
# Of one CPU rank. So that a single rank cannot hold the longest sequences but two together can,
# as on real accelerators.
MEMORY_BUDGET=84MB

activate_environment
install_project

device=cpu
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus >= NUM_RANKS)); then
    device=cuda
fi
# On a CPU the ranks share its cores: measure under the load training will have.
load=()
[[ $device == cpu ]] && load=(--load-ranks "$NUM_RANKS")

training=(lobra train --model "$MODEL" --trainer-config "$CONFIG" --strategy-config "$PLAN"
    --output-dir "$RUN" --device "$device" "${OPTIONS[@]}")
check_options "${training[@]:1}"

if [[ -e $RUN ]]; then
    kept="$RUN.$(date +%Y%m%d_%H%M%S)"
    mv "$RUN" "$kept"
    say "an earlier run was moved to $kept"
fi

begin=$SECONDS
say "1/4 time profile: one layer of the $MODEL model on 1 and 2 $device ranks, a first look (--quick)"
bash scripts/cost_model_benchmark.sh "$MODEL" 1,2 --quick --device "$device" --restart changed \
    --max-seq-length "$MAX_SEQ_LENGTH" --trainer-config "$CONFIG" "${load[@]}"

say "2/4 memory profile: tokens a micro-batch may hold in $MEMORY_BUDGET a rank"
bash scripts/profile_memory.sh "$MODEL" "$LARGEST_LAYOUT" "$NUM_TASKS" "$CONFIG" "$MAX_SEQ_LENGTH" \
    --device "$device" --restart changed --memory-budget "$MEMORY_BUDGET"

say "3/4 plan for $NUM_RANKS ranks"
bash scripts/deploy_strategy_plan.sh "$MODEL" "$NUM_RANKS" "$NUM_BUCKETS" "$NUM_TASKS" \
    "$MAX_SEQ_LENGTH" "$CONFIG" "$PLAN"

say "4/4 training $NUM_TASKS adapters together"
"${training[@]}"

lobra report "$RUN" --plots | grep '^written' || die 1 "$RUN: no pictures were drawn"

say "done in $((SECONDS - begin)) s after installation"
printf '%s\n' \
    "plan:      strategy_config/$PLAN.yaml" \
    "profiles:  exp_result/profile/  (measured quickly; without --quick they are exacter)" \
    "adapters:  $RUN/adapters/  (PEFT's format, one folder a task)" \
    "pictures:  $RUN/report/losses.png, $RUN/report/timeline.png; lobra report $RUN prints it all" \
    "" \
    "With your own data (docs/my_data.md):" \
    "  lobra init my_tasks.yaml                      # a task file, every field explained" \
    "  lobra data show --model MODEL --trainer-config my_tasks.yaml" \
    "  lobra plan --model MODEL --num-gpus N --trainer-config my_tasks.yaml --strategy-config my_plan"
