#!/usr/bin/env bash
# Fetches LobRA's public data sets and converts them into data/<name>.jsonl (needs network). What is
# there is kept; a set that fails does not stop the others; data/SHA256SUMS has the checksums,
# data/REVISIONS.json the hub's commits, which a set fetched again is fetched at.
#
# DATASET         a name, such as dolly or xsum; without any, all twelve
#
# Options are those of `lobra data fetch` (--help explains them).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage 0 12 "[DATASET ...]" "$@"
need_lobra
exec lobra data fetch "${ARGS[@]}" "${OPTIONS[@]}"
