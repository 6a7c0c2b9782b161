#!/usr/bin/env bash
# Every check that needs a GPU, on one GPU, in under 8 minutes.
#
#   bash benchmarks/gpu.sh OUT
#
# OUT/gpu.json has all results and the bars they are held to, OUT/log.txt all output. A part that fails or takes too long does not
# end the others, and what it had found is kept; one that needs a package this Python lacks is left
# out. Exits with 1 if a part failed or was left out.
#
#   DEVICE=cpu          tries it all without a GPU, on a tiny job, with ten times the time
#   PARTS="a b"         only these
#   NCCL_LIBRARY=FILE   an NCCL from 2.30 on, where torch's own is older: it lets several ranks share
#                       the GPU, side by side under MPS
set -uo pipefail
if [[ $# != 1 ]]; then
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
device=${DEVICE:-cuda} python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
job=$device sizes=(--tasks 4 --tasks 16 --peft-tasks 4 --steps 3 --sequences 64) steps=10 repeats=20 patience=1
[[ $device == cpu ]] && job=tiny sizes=(--tasks 2 --tasks 4 --steps 1) steps=4 repeats=1 patience=10
: >"$out/log.txt" && : >"$out/parts.tsv"
left_out=$("$python" benchmarks/gpu_packages.py 2> >(tee -a "$out/log.txt" >&2))

# part NAME LIMIT_S COMMAND ...: runs it, notes how it ended, and brings OUT/gpu.json up to date.
part() {
    local name=$1 limit_s=$(($2 * patience)) start=$SECONDS status
    shift 2
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
    status=127 # a shell's, of a command that is not there
    if [[ " $left_out " != *" $name "* ]]; then
        printf '== %s (at most %s s): %s\n' "$name" "$limit_s" "$*" | tee -a "$out/log.txt"
        timeout --signal=INT --kill-after=10 "$limit_s" "$@" 2>&1 | tee -a "$out/log.txt"
        status=${PIPESTATUS[0]}
    fi
    { # one at a time: the report tells of the last line
        flock 9
        printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) >&9
        "$python" -m benchmarks.gpu_report "$out" "$device"
    } 9>>"$out/parts.tsv"
}

share_gpu() {
    [[ $device == cuda ]] || return 0
    mps=$(mktemp -d) # a socket's path must be short
    export NCCL_MULTI_RANK_GPU_ENABLE=1 CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps
    [[ -n ${NCCL_LIBRARY:-} ]] && export LD_PRELOAD=$NCCL_LIBRARY
    nvidia-cuda-mps-control -d
}

own_gpu() {
    [[ $device == cuda ]] || return 0
    echo quit | nvidia-cuda-mps-control
    rm -rf "$mps"
    unset NCCL_MULTI_RANK_GPU_ENABLE CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY LD_PRELOAD
}

# bench NAME LIMIT_S SUBJECT ...: the part is a benchmark on the device, its rows in OUT/NAME.json.
bench() {
    part "$1" "$2" "$python" -m benchmarks "${@:3}" --device "$device" --json "$out/$1.json"
}

# Only the files that have such tests: others import what the parts do not need.
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v test_tiers)

"$python" -c "import xdist" 2>/dev/null && at_once=(-n 6) || at_once=()

# What is not timed, all at once: most of its time goes into starting processes.
share_gpu
part tests 140 "$python" -m pytest -q -p no:cacheprovider "${at_once[@]}" -m gpu "${files[@]}" &
bench equality 140 equality --families llama --precision fp64 --precision fp32 --precision bf16 --plans "one <1,1>" &
bench ranks 140 equality --families llama --precision fp64 --precision fp32 --plans "<1,1> <2,2>;<1,1>x2 <2,1> <1,2>" &
wait
own_gpu
bench multi_lora 110 multi_lora --job "$job" "${sizes[@]}" --operators "$out/operators.csv"
bench training 130 training_run "$out/training" --job "$job" --steps "$steps"
bench activations 25 activation_bytes --job "$job"
bench attention 30 packed_parts
bench linears 20 adapted_linear --repeats "$repeats"
! awk -F'\t' '$2 != 0' "$out/parts.tsv" | grep -q .
