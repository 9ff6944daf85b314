#!/bin/bash
# Images behind web addresses, downloaded by a Slurm job array into one cache. Written from Slurm's manual; not run here.
#
#     sbatch --array=0-15 examples/fetch_slurm.sh shop.yaml
#
# The recipe names a cache folder that all nodes see (data.image_cache). Each task asks for the addresses whose hash falls
# to it, so tasks never ask for the same one, and one that was killed is simply started again. The array counts from 0.
#SBATCH --job-name=fetch-images
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=04:00:00
set -eu
exec phi3v data check "$1" --fetch --shard "${SLURM_ARRAY_TASK_ID}/${SLURM_ARRAY_TASK_COUNT}"
