# shellcheck shell=bash
# One job of hola_megatron.train under Slurm, from top to bottom in `main`; usage: docs/slurm.md.
# Sourced in the repository's root by slurm/hola_*.sh, which set
#     RECIPE           the recipe's path              (HOLA_RECIPE overrides it)
#     RANKS_PER_NODE   processes a node, one a GPU    (HOLA_RANKS_PER_NODE overrides it)
#     MIN_FREE_GB      free GB for two checkpoints       (HOLA_MIN_FREE_GB overrides it)
# What a site needs in addition (account, partition, modules, container) is in slurm/site.sh (or $HOLA_SITE), which
# read_site.sh reads; see slurm/site.example.sh. What doctor.sh needs as well is in job.sh.
set -uo pipefail

main() {
    # outside a job the script submits itself: this way sbatch sees the SBATCH_* settings of slurm/site.sh
    [ -n "${SLURM_JOB_ID:-}" ] || exec sbatch "slurm/$(basename "$0")" "$@"
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    describe_job
    read_arguments "$@"
    find_run_folder
    count_restart
    check_health
    [ -z "$signalled" ] || queue_again "stopped by SIG$signalled before training began"
    train
    conclude
}

# Array tasks differ by %a in any argument, and by their line of the file HOLA_SWEEP.
read_arguments() {
    local all=("$@") swept=() line argument
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        if [ -n "${HOLA_SWEEP:-}" ]; then
            line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$HOLA_SWEEP")
            [ -n "$line" ] || fail 2 "HOLA_SWEEP: $HOLA_SWEEP has no line $SLURM_ARRAY_TASK_ID, which this task is to use"
            read -r -a swept <<<"$line"
        fi
        all+=(${swept[@]+"${swept[@]}"})
        all=(${all[@]+"${all[@]//%a/$SLURM_ARRAY_TASK_ID}"})
    fi
    for argument in ${all[@]+"${all[@]}"}; do
        case $argument in
            --new) asked_new=yes ;;
            --*) flags+=("$argument") ;;
            *) overrides+=("$argument") ;;
        esac
    done
}

# As training will see it; a recipe that cannot be used ends the job here.
find_run_folder() {
    local program code
    program='
import sys
from hola_megatron.config import load_recipe
from hola_megatron.errors import run_cli
run_cli(lambda: print(load_recipe(sys.argv[1], sys.argv[2:]).folder))'
    run=$(srun --nodes=1 --ntasks=1 ${HOLA_SRUN[@]+"${HOLA_SRUN[@]}"} "${python[@]}" -c "$program" "$recipe" \
        ${overrides[@]+"${overrides[@]}"})
    code=$?
    [ -z "$signalled" ] || queue_again "stopped by SIG$signalled before training began"
    [ "$code" -eq 0 ] || conclude "$code"
    run=${run##*$'\n'}
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [[ " ${overrides[*]-}" != *" run_dir="* ]]; then
        run=$run-$SLURM_ARRAY_TASK_ID
        overrides+=("run_dir=$run")
    fi
}

# Restarts without a newer checkpoint are counted when an attempt starts, so that one that was killed counts as well.
# $run/slurm_restarts holds: newest step when this attempt began, such restarts in a row, and "new" until training has
# carried out --new, which moves the old folder aside and this file with it.
count_restart() {
    local file=$run/slurm_restarts before=-1 pending=''
    newest=$(newest_step)
    if [ "$restarts" -eq 0 ]; then
        pending=${asked_new:+new}
    else
        [ ! -f "$file" ] || read -r before idle pending <"$file"
        # bash would take other text in an arithmetic expression for a command
        if ! [[ $before =~ ^(-1|[0-9]{1,18})$ && $idle =~ ^[0-9]{1,9}$ && $pending =~ ^(new)?$ ]]; then
            log "$file: damaged, counting restarts from 0"
            before=-1 idle=0 pending=''
        fi
        if [ "$newest" -gt "$before" ]; then idle=0; else idle=$((10#$idle + 1)); fi
        mkdir -p "$run"
    fi
    # a first attempt does not make the folder, or --new would have an empty one to move aside
    [ ! -d "$run" ] || echo "$newest $idle $pending" >"$file"
    if [ -n "$asked_new" ] && { [ "$restarts" -eq 0 ] || [ -n "$pending" ]; }; then
        flags+=(--new)
    fi
    log "recipe $recipe, run folder $run, newest checkpoint: step $newest, restarts without progress: $idle" \
        "(at most $max_restarts)"
    [ "$idle" -le "$max_restarts" ] || no_progress "restarted by Slurm"
}

newest_step() { # of the whole checkpoints of the run; -1 for none
    local manifest newest=-1 step
    for manifest in "$run"/checkpoints/step_*/manifest.json; do
        if [[ -f $manifest && $manifest =~ /step_([0-9]+)/manifest\.json$ ]]; then
            step=$((10#${BASH_REMATCH[1]}))
            # a copy of another step's checkpoint under this name would hide all progress
            if [ "$step" -gt "$newest" ] && grep -q "^ \"step\": $step,\?$" "$manifest"; then newest=$step; fi
        fi
    done
    echo "$newest"
}

check_health() {
    local parent token code gpus=$ranks
    parent=$(dirname "$run")
    token=$parent/.health-$job
    [ "${HOLA_DEVICE:-cuda}" != cpu ] || gpus=0
    if ! mkdir -p "$parent" || ! echo "$job attempt $restarts" >"$token"; then
        fail 1 "health: $parent cannot be written to (see above); set run_dir to a writable shared disk"
    fi
    "${one_a_node[@]}" bash slurm/health.sh "$token" "$job attempt $restarts" "${HOLA_MIN_FREE_GB:-$MIN_FREE_GB}" "$gpus"
    code=$?
    rm -f "$token"
    [ "$code" -eq 0 ] || [ -n "$signalled" ] ||
        fail 1 "health: a node is not fit (named above); training was not started, the job is not queued again"
}

train() {
    local exit_file
    # srun knows the highest code of the nodes: 76 of those that lost the one that knew better
    exit_file=$(dirname "$run")/.exit-$job
    rm -f "$exit_file"
    export HOLA_EXIT_FILE=$exit_file
    "${launch[@]}" -m hola_megatron.train "$recipe" ${overrides[@]+"${overrides[@]}"} ${flags[@]+"${flags[@]}"} &
    srun_pid=$!
    [ -z "$signalled" ] || insist
    wait_for "$srun_pid"
    code=$?
    [ "$code" -ne 76 ] || [ ! -s "$exit_file" ] || read -r code <"$exit_file"
    rm -f "$exit_file"
    [ -z "$insisting" ] || kill "$insisting" 2>/dev/null
}

wait_for() { # pid; returns its code, however many signals interrupt the waiting
    local code last
    while true; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if [ "$code" -gt 128 ]; then # perhaps that of a signal that came just when the process had ended
        wait "$1" 2>/dev/null
        last=$?
        [ "$last" -eq 127 ] || code=$last
    fi
    return "$code"
}

# Slurm sends SIGUSR1 ahead of the time limit (--signal=B:USR1@...) and SIGTERM at preemption. srun hands SIGUSR1 to
# every process of the step but answers SIGTERM by killing them, so both are forwarded as SIGUSR1.
# shellcheck disable=SC2317  # called by trap
on_signal() {
    signalled=$1
    log "SIG$1: telling the ranks to save and stop"
    [ -z "$srun_pid" ] || insist
}

# srun loses a signal that it receives while it starts the step. Launchers and ranks take any number of them.
insist() {
    kill -USR1 "$srun_pid" 2>/dev/null
    [ -z "$insisting" ] || return
    while sleep 5 && kill -USR1 "$srun_pid"; do :; done >/dev/null 2>&1 &
    insisting=$!
}

conclude() { # [code]
    code=${1:-$code}
    case $code in
        0) log "finished" ;;
        75) queue_again "stopped by a signal (code 75)" ;;
        76) queue_again "a rank was lost (code 76, see above)" ;;
        2) log "code 2: the recipe cannot be used (see above); not queued again" ;;
        3) log "code 3: the data cannot be used (see above); not queued again" ;;
        4) log "code 4: training diverged (see above); not queued again" ;;
        *) # a signal that came before the ranks listened, or a rank that hung on its way out
            [ -z "$signalled" ] || queue_again "stopped by SIG$signalled (code $code)"
            log "code $code: no known fault that a restart repairs (see above); not queued again"
            ;;
    esac
    exit "$code"
}

queue_again() { # why
    local state
    state=$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null)
    if [ "$state" != RUNNING ]; then
        log "$1; the job is ${state:-gone} already: Slurm or its user has ended it"
        exit 75
    fi
    if [ "$(newest_step)" -le "$newest" ] && [ "$idle" -ge "$max_restarts" ]; then
        no_progress "$1"
    fi
    log "$1; queueing job $job again"
    scontrol requeue "$job" || fail 75 "job $job cannot be queued again (see above); submit it again to resume"
    exit 0
}

no_progress() { # why
    fail 75 "$1; giving up after $idle restarts without a checkpoint newer than step $newest in $run \
(HOLA_MAX_RESTARTS=$max_restarts); find out why, then submit again"
}

source slurm/job.sh
recipe=${HOLA_RECIPE:-$RECIPE}
max_restarts=${HOLA_MAX_RESTARTS:-3}
signalled='' srun_pid='' insisting='' asked_new='' overrides=() flags=() run='' newest=-1 idle=0 code=0
main "$@"
