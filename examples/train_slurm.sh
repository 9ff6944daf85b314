#!/bin/bash
# One training on several machines of a Slurm cluster, one torchrun on each. Written from the manuals; not run here.
#
#     sbatch --nodes=2 examples/train_slurm.sh recipes/full_fsdp_8gpu.yaml [key=value ...]
#
# The recipe's output, its rows and the model's files lie where all nodes see them. Ten minutes before the time is up Slurm
# sends SIGTERM to the ranks, which save the step that they are at; the same command goes on with the run.
#SBATCH --job-name=phi3v
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
set -eu
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:29500" \
    -m phi3v train "$@"
