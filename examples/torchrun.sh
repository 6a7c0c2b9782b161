#!/usr/bin/env bash
# Starts this host's ranks with torchrun; every host runs it, with the same variables and arguments,
# which are those of `lobra train` but for --output-dir. Run again, it goes on from the last checkpoint.
#
#   NODES=2 RANKS=8 FIRST=node1 RUN=/shared/runs/a bash examples/torchrun.sh \
#       --model 7B --trainer-config exp_task6 --strategy-config 7B_hetero_fuse
#
# NODES      how many hosts there are
# RANKS      how many ranks this host takes
# FIRST      name or address of the host where all meet
# RUN        the run's folder
# PORT       a free port on FIRST (29500)
# NODE_RANK  this host's number, 0 on FIRST, which then has rank 0. Without it the hosts number
#            themselves, by the order of their names
set -euo pipefail
: "${NODES:?how many hosts there are}" "${RANKS:?how many ranks this host takes}"
: "${FIRST:?name or address of the host where all meet}" "${RUN:?the folder of the run}"

resume=()
if compgen -G "$RUN/checkpoints/step_*/state.json" >/dev/null; then
    resume=(--resume)
fi
if [[ -n ${NODE_RANK-} ]]; then
    meet=(--node-rank "$NODE_RANK" --master-addr "$FIRST" --master-port "${PORT:-29500}")
else
    meet=(--rdzv-backend c10d --rdzv-endpoint "$FIRST:${PORT:-29500}" --rdzv-id "$(basename "$RUN")")
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" "${meet[@]}" \
    -m lobra train --output-dir "$RUN" "${resume[@]}" "$@"
