#!/usr/bin/env bash
# Whether a node is fit, in one line; run on every node by slurm/common.sh.
# slurm/health.sh TOKEN_FILE TOKEN MIN_FREE_GB GPUS: the first node wrote TOKEN to TOKEN_FILE, next to the run folder.
set -uo pipefail
token_file=$1 token=$2 min_free_gb=$3 gpus=$4
folder=$(dirname "$token_file")
node=${SLURMD_NODENAME:-$(hostname)}

unfit() {
    echo "health | $node: $1" >&2
    exit 1
}

check_gpus() {
    local listed count
    command -v nvidia-smi >/dev/null ||
        unfit "no nvidia-smi, and $gpus GPUs are needed; ask for nodes with GPUs, or set HOLA_DEVICE=cpu"
    listed=$(timeout -k 5 60 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1) ||
        unfit "nvidia-smi fails or hangs (${listed##*$'\n'}); leave the node out: sbatch --exclude=$node"
    count=$(grep -c . <<<"$listed")
    [ "$count" -ge "$gpus" ] ||
        unfit "$count GPUs, and $gpus are needed; leave the node out: sbatch --exclude=$node"
    about="$count GPUs (${listed%%$'\n'*}), "
}

check_disk() {
    local data output
    [ "$(timeout -k 5 60 cat "$token_file" 2>/dev/null)" = "$token" ] ||
        unfit "$folder: what the first node wrote is not seen here; set run_dir to a disk that all nodes share"
    data=$(head -c 100000 /dev/urandom | base64)
    output=$(timeout -k 5 60 dd of="$probe" bs=1M conv=fsync <<<"$data" 2>&1) ||
        unfit "$folder: no write and fsync within 60 s (${output##*$'\n'}); free space, or set run_dir to another disk"
    [ "$(timeout -k 5 60 cat "$probe")" = "$data" ] ||
        unfit "$folder: what is read is not what was written; set run_dir to another disk"
    free_gb=$(($(df -Pk "$folder" | awk 'NR == 2 { print $4 }') * 1024 / 1000000000))
    [ "$free_gb" -ge "$min_free_gb" ] ||
        unfit "$folder: $free_gb GB free, $min_free_gb needed (HOLA_MIN_FREE_GB); free space, or set run_dir to another disk"
}

about='' probe=$folder/.health-${SLURM_JOB_ID:-0}-$node
trap 'rm -f "$probe"' EXIT
[ "$gpus" -eq 0 ] || check_gpus
check_disk
echo "health | $node: $about$folder writable, $free_gb GB free"
