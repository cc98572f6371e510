#!/usr/bin/env bash
# slurm/prepare_data.sh PARTS INPUTS... --tokenizer T --sequence-length N --out FOLDER    (docs/data.md)
# Submits an array of PARTS tasks, each one part of the dataset, and a job that joins the parts when all are made.
# A task that is requeued (a lost node, preemption) goes on from its last finished shard. The same command again makes
# what is missing. HOLA_PREPARE_CPUS: CPUs of a task, 8 unless it is set.
#SBATCH --job-name=prepare_data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -uo pipefail

main() {
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        submit "$@"
    elif [ "$1" = merge ]; then
        run tools/prepare_data.py --merge "$2"
    else
        run tools/prepare_data.py "${@:2}" --part "$SLURM_ARRAY_TASK_ID/$1" --workers "${SLURM_CPUS_PER_TASK:-1}"
    fi
}

fail() {
    echo "prepare_data.sh | $1" >&2
    exit 2
}

submit() {
    local out array joining
    [[ ${1:-} =~ ^[1-9][0-9]{0,4}$ ]] || fail "'${1:-}': the first argument is the number of parts, 1 to 99999"
    out=$(value_of --out "${@:2}")
    [ -n "$out" ] || fail "--out: required, the folder of the dataset, on a disk that all nodes share"
    unset SBATCH_GPUS_PER_NODE SBATCH_GPUS SBATCH_GRES # of site.sh, for training
    array=$(sbatch --parsable --array="1-$1" --cpus-per-task="${HOLA_PREPARE_CPUS:-8}" "$script" "$@") || exit
    joining=$(sbatch --parsable --cpus-per-task=1 --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
        --output="${SBATCH_OUTPUT:-%x-%j.log}" "$script" merge "$out") || exit
    echo "prepare_data.sh | job ${array%%;*}: $1 parts; job ${joining%%;*}: joins them in $out"
}

value_of() { # option words...; the last one given, as --option VALUE or --option=VALUE
    local option=$1 found=''
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$option") found=${2:-} ;;
            "$option="*) found=${1#*=} ;;
        esac
        shift
    done
    echo "$found"
}

run() {
    exec srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none \
        ${HOLA_SRUN[@]+"${HOLA_SRUN[@]}"} bash slurm/on_node.sh ${HOLA_RUN[@]+"${HOLA_RUN[@]}"} \
        "${HOLA_PYTHON:-.venv/bin/python}" "$@"
}

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
script=slurm/prepare_data.sh
source slurm/read_site.sh
main "$@"
