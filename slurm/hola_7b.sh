#!/usr/bin/env bash
# sbatch slurm/hola_7b.sh [section.key=value ...]      8 nodes of 8 GPUs; docs/slurm.md
# For GPUs of 141 GB; on 64 GPUs it needs 74 GB a GPU by the plan. recipes/hola_7b.yaml names overrides for less memory.
#SBATCH --job-name=hola_7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export RECIPE=recipes/hola_7b.yaml RANKS_PER_NODE=8 MIN_FREE_GB=180
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" && source slurm/common.sh
