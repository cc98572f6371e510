#!/usr/bin/env bash
# sbatch slurm/hola_3b.sh [section.key=value ...]      4 node(s) of 8 GPUs
#SBATCH --job-name=hola_3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hola_3b-%j.log
#SBATCH --signal=USR1@300
RECIPE=recipes/hola_3b.yaml
RANKS_PER_NODE=8
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
