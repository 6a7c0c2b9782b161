#!/usr/bin/env bash
# Trains as a Slurm job. From the folder that holds examples/, with the arguments of `lobra train`
# but for --output-dir:
#
#   RUN=/shared/runs/a sbatch examples/slurm.sh \
#       --model 7B --trainer-config exp_task6 --strategy-config 7B_hetero_fuse
#
# Submitted again, or requeued after a node has failed, it goes on from the last checkpoint.
#
#SBATCH --job-name=lobra
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
# The signal, two minutes before the time is over, ends the run after its step, with a checkpoint.
set -euo pipefail
: "${RUN:?the folder of the run}"
export RUN NODES=$SLURM_NNODES RANKS=${SLURM_GPUS_PER_NODE##*:}
export PORT=$((20000 + SLURM_JOB_ID % 10000)) # another for every job on a node
read -r FIRST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST

# A node's number is known on the node only.
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash examples/torchrun.sh "$@"' \
    torchrun.sh "$@"
