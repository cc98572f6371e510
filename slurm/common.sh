# Shared by slurm/*.sh: one launcher a node, signals handed on, requeue after a saved checkpoint.
# A site's account, partition, modules or container go into slurm/site.sh (not in git), which is read if present:
#     export SBATCH_ACCOUNT=...      module load ...      HOLA_PYTHON=/path/to/python
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [ -f slurm/site.sh ]; then
    # shellcheck disable=SC1091
    source slurm/site.sh
fi

PYTHON=${HOLA_PYTHON:-.venv/bin/python}
MAX_RESTARTS=${HOLA_MAX_RESTARTS:-20}
restarts=${SLURM_RESTART_COUNT:-0}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

echo "job $SLURM_JOB_ID (restart $restarts of at most $MAX_RESTARTS) on $SLURM_JOB_NODELIST, recipe $RECIPE"
env | grep -E '^(NCCL|TORCH|CUDA|OMP)_' | sort || true

# The signal of `#SBATCH --signal` (no B:) and of preemption reach the srun step, whose launcher hands them to the
# workers; they agree at a step boundary, save, and end with code 75.
code=0
srun --ntasks-per-node=1 --kill-on-bad-exit=0 "$PYTHON" -m hola_megatron.launch \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" --rdzv-id="$SLURM_JOB_ID-$restarts" \
    -m hola_megatron.train "$RECIPE" "$@" || code=$?

if [ "$code" -eq 75 ] && [ "$restarts" -lt "$MAX_RESTARTS" ]; then
    echo "checkpoint saved; queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
