#!/usr/bin/env bash
# sbatch --nodes=N slurm/doctor.sh [options of tools/doctor.py]     are these nodes fit for one run? docs/cluster.md
#SBATCH --job-name=doctor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
RANKS_PER_NODE=8
source slurm/job.sh
# outside a job the script submits itself, as the others do: sbatch sees the SBATCH_* settings of the site file
[ -n "${SLURM_JOB_ID:-}" ] || exec sbatch slurm/doctor.sh "$@"
describe_job
exec "${launch[@]}" tools/doctor.py --nodes "$@"
