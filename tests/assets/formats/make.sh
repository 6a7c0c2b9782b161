#!/usr/bin/env bash
# Writes the files of this folder with the code of another commit. It was run with 72b5b88, the last
# before packages were moved, and is kept to say how; running it anew makes sense for a later format,
# beside these. usage: PYTHON=... OLD=<checkout of 72b5b88> make.sh SCRATCH_FOLDER
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=$OLD
lobra() { "$PYTHON" -P -m trainer.cli "$@"; }

mkdir -p "$1" && cd "$1"
cp -r "$here/../golden/base" "$here/../golden/data" "$here/tasks.json" .
lobra profile time --model base --tp 1,2 --device cpu --max-seq-length 256 --max-tokens 512 \
    --trainer-config tasks.json
lobra profile memory --model base --num-gpus 2 --device cpu --memory-budget 2MB \
    --max-seq-length 256 --trainer-config tasks.json
lobra plan --model base --num-gpus 3 --max-seq-length 256 --trainer-config tasks.json \
    --strategy-config plan.yaml
lobra train --model base --trainer-config tasks.json --strategy-config plan.yaml --device cpu \
    --max-steps 2 --validate-every 1 --output-dir run
profiles="$OLD/exp_result/profile/cpu-2-cores"
lobra plan --model tiny --num-gpus 4 --max-seq-length 2048 \
    --trainer-config "$OLD/trainer_config/quickstart.json" --strategy-config plan_tiny.yaml \
    --time-profile "$profiles/profile_time_tiny.csv" \
    --memory-profile "$profiles/max_tokens_tiny_4tasks.csv"

mkdir -p "$here/run"
cp -r exp_result plan.yaml plan_tiny.yaml "$here"
rm -f "$here"/exp_result/profile/*/.*.lock
cp -r run/config.yaml run/metrics.jsonl run/checkpoints "$here/run"
