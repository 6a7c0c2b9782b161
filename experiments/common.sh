# Sourced by expr_7b.sh, expr_32b.sh and expr_70b.sh.

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"

experiment_help() { # experiment_help MODEL FOLDER
    local script="bash experiments/expr_${1,,}.sh"
    cat <<END
usage: $script --simulate [--option value ...]
       $script [--option value ...]

LobRA's experiments with the $1 model. Tables go to a folder; "lobra report FOLDER" makes pictures
and a page of them. The same command goes on where it was interrupted.

--simulate     no GPU is needed: methods, ablation, buckets, planning times (70B: scalability too) by
               simulation; tables in $2
without it     the real jobs, on the GPUs of a cluster: profile, plan, train methods and ablation
               (the other studies are simulated only); tables in ${2}_real. See --dry-run first.

Environment, with --simulate: LOBRA_LENGTHS, a file or folder of sequence lengths.

Options with --simulate:
END
    experiment_options simulate "$2"
    echo
    echo "Options without:"
    experiment_options real "${2}_real"
}

experiment_options() { # experiment_options COMMAND FOLDER: its options but what the script gives
    lobra experiment "$1" --help |
        sed -n -e '1,/^options:/d' -e '/^  MODEL /d' \
            -e "s|^\(  --output PATH .*\) (required)|\1 (default $2)|" -e p
}

experiment() { # experiment MODEL [--simulate] [--option value ...]
    local model=$1 simulate=false help=false
    shift
    local options=()
    while (($#)); do
        case $1 in
            --simulate) simulate=true ;;
            -h | --help) help=true ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    need_lobra
    local folder="exp_result/expr_${model,,}"
    if $help; then
        experiment_help "$model" "$folder"
    elif $simulate; then
        # the planners are single-threaded programs; more threads only disturb their timing
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
            lobra experiment simulate "$model" --output "$folder" "${options[@]}"
    else
        lobra experiment real "$model" --output "${folder}_real" "${options[@]}"
    fi
}
