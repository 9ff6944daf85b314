#!/bin/bash
# Images behind web addresses, downloaded by a Slurm job array into one cache. Written from Slurm's manual; not run under Slurm.
#
#     sbatch --array=0-15 examples/fetch_slurm.sh shop.yaml 16
#
# The recipe names a cache folder that all nodes see (data.image_cache). The array counts from 0, and the last number says
# how many parts there are: Slurm's own count is that of the tasks of this command. Each task asks for the addresses whose
# hash falls to it, so tasks never ask for the same one. One that was killed is started again alone, and goes on:
#
#     sbatch --array=3 examples/fetch_slurm.sh shop.yaml 16
#SBATCH --job-name=fetch-images
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=04:00:00
set -eu
recipe=${1:?the recipe} parts=${2:?how many parts there are, 16 for --array=0-15}
exec phi3v data check "$recipe" --fetch --shard "${SLURM_ARRAY_TASK_ID:?start it with sbatch --array=0-15}/$parts"
