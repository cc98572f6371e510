# shellcheck shell=bash disable=SC2034
# What your cluster needs. Copy to slurm/site.sh (ignored by git), keep the lines you need. Without it: the defaults.
# The batch script reads it on the first node, and every node again just before it starts Python: modules are loaded
# where the ranks run, and a value may depend on the node.

# Read by sbatch. They take effect if you start a job by `slurm/hola_1b.sh ...` (which calls sbatch), or after
# `source slurm/site.sh`; sbatch itself does not read this file.
# export SBATCH_ACCOUNT=my_account
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=12:00:00

# Modules. A container that srun starts (Pyxis) has none. On nodes whose shells have no `module`, load it first.
# type module >/dev/null 2>&1 || source /etc/profile.d/modules.sh
# type module >/dev/null 2>&1 && module load cuda/13.0 gcc/13

# The network between nodes, by interface name: for NCCL, and for gloo (CPUs). InfiniBand, RoCE, EFA: slurm/sites/.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# Where Hugging Face's libraries keep what they download.
# export HF_HOME=/scratch/$USER/huggingface

# The Python to use; the default is .venv/bin/python of this clone.
# HOLA_PYTHON=/shared/envs/hola/bin/python

# A container (slurm/containers, docs/cluster.md): words put before Python (Apptainer), or options of srun (Pyxis).
# The image has the packages, the clone the code: HOLA_PYTHON is the image's, PYTHONPATH the clone.
# HOLA_RUN=(apptainer exec --nv --bind "$PWD,/scratch" /shared/images/hola.sif)
# HOLA_SRUN=(--container-image=/shared/images/hola.sqsh --container-mounts="$PWD:$PWD,/scratch:/scratch")
# HOLA_SRUN+=(--container-workdir="$PWD" --no-container-mount-home)
# HOLA_PYTHON=/opt/hola/bin/python
# export PYTHONPATH=$PWD:$PWD/kernels

# Nodes with another number of GPUs (also: export SBATCH_GPUS_PER_NODE=4).
# HOLA_RANKS_PER_NODE=4
