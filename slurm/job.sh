# shellcheck shell=bash disable=SC2034
# What jobs of several nodes share; sourced in the repository's root by common.sh and doctor.sh.

log() { echo "slurm | $*"; }

fail() { # code message
    echo "slurm | $2" >&2
    exit "$1"
}

# Sets job, endpoint, and launch: the words that start one launcher on every node, up to the program it starts.
describe_job() {
    local nodes address
    # of an array task SLURM_JOB_ID may be the number of the whole array: requeueing that would requeue every task
    job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # the address Slurm itself uses; node names need not resolve
    address=$(scontrol show node "${nodes%%$'\n'*}" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    endpoint=${address:-${nodes%%$'\n'*}}:$((15000 + SLURM_JOB_ID % 15000))
    # --wait: once one node has ended, ranks that hang on their way out do not hold the job for ever
    launch=("${one_a_node[@]}" --wait=120 ${HOLA_SRUN[@]+"${HOLA_SRUN[@]}"} "${python[@]}" -m hola_megatron.launch
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks"
        --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$job-$restarts")
    log "job $job, attempt $((restarts + 1)), $SLURM_JOB_NUM_NODES x $ranks ranks on $SLURM_JOB_NODELIST," \
        "rendezvous at $endpoint, $(date '+%F %T')"
    env | grep -E '^(NCCL|TORCH|CUDA|OMP|GLOO|UCX|FI|TRITON|HOLA)_' | sort | sed 's/^/slurm | /'
}

source slurm/read_site.sh
ranks=${HOLA_RANKS_PER_NODE:-$RANKS_PER_NODE}
# each node reads the site file itself, outside of a container that HOLA_RUN starts and inside of one that srun starts
python=(bash slurm/on_node.sh ${HOLA_RUN[@]+"${HOLA_RUN[@]}"} "${HOLA_PYTHON:-.venv/bin/python}")
one_a_node=(srun --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0)
restarts=${SLURM_RESTART_COUNT:-0}
