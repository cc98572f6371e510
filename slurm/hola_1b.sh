#!/usr/bin/env bash
# sbatch slurm/hola_1b.sh [section.key=value ...]      1 node(s) of 8 GPUs
#SBATCH --job-name=hola_1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hola_1b-%j.log
#SBATCH --signal=USR1@300
RECIPE=recipes/hola_1b.yaml
RANKS_PER_NODE=8
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
