#!/usr/bin/env bash
# sbatch slurm/hola_340m.sh [section.key=value ...]      one node of 8 GPUs
#SBATCH --job-name=hola_340m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hola_340m-%j.log
#SBATCH --signal=USR1@300
RECIPE=recipes/hola_340m.yaml
RANKS_PER_NODE=8
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
