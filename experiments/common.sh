# Sourced by expr_7b.sh, expr_32b.sh and expr_70b.sh.

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"

experiment() { # experiment MODEL [--simulate] [--option value ...]
    local model=$1 simulate=false
    shift
    local options=()
    while (($#)); do
        case $1 in
            --simulate) simulate=true ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    need_lobra
    local folder="exp_result/expr_${model,,}"
    if $simulate; then
        # the planners are single-threaded programs; more threads only disturb their timing
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
            python -m experiments.simulate "$model" --output "$folder" "${options[@]}"
    else
        python -m experiments.jobs "$model" --output "${folder}_real" "${options[@]}"
    fi
}
