#!/usr/bin/env bash
# sbatch slurm/hola_1b.sh [section.key=value ...]      one node of 8 GPUs; docs/slurm.md
#SBATCH --job-name=hola_1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export RECIPE=recipes/hola_1b.yaml RANKS_PER_NODE=8 MIN_FREE_GB=40
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" && source slurm/common.sh
