#!/usr/bin/env bash
# Fetches and converts LobRA's twelve public data sets into data/<name>.jsonl (needs network).
# What is there is kept; a set that fails does not stop the others; data/SHA256SUMS has the
# checksums, data/REVISIONS.json the hub's commits, which a set fetched again is fetched at.
# usage: bash scripts/create_finetune_datasets.sh [DATASET ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need_lobra
exec lobra data fetch "$@"
