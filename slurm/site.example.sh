# shellcheck shell=bash disable=SC2034
# What your cluster needs. Copy to slurm/site.sh (ignored by git), keep the lines you need. Without it: the defaults.

# Read by sbatch. They take effect if you start a job by `slurm/hola_1b.sh ...` (which calls sbatch), or after
# `source slurm/site.sh`; sbatch itself reads no file of ours.
# export SBATCH_ACCOUNT=my_account
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=12:00:00

# Run on every node of the job's side before Python starts.
# module load cuda/12.8 gcc/13
# export NCCL_SOCKET_IFNAME=ib0
# export HF_HOME=/scratch/$USER/huggingface

# The Python to use; the default is .venv/bin/python of this clone.
# HOLA_PYTHON=/shared/envs/hola/bin/python

# A container: words put before Python (Apptainer), or options of srun (Pyxis). HOLA_PYTHON is then the one inside.
# HOLA_RUN=(apptainer exec --nv --bind "$PWD,/scratch" /shared/images/hola.sif)
# HOLA_SRUN=(--container-image=/shared/images/hola.sqsh --container-mounts="$PWD,/scratch" --container-workdir="$PWD")

# Nodes with another number of GPUs (also: export SBATCH_GPUS_PER_NODE=4).
# HOLA_RANKS_PER_NODE=4
