# shellcheck shell=bash
# Reads what the site needs: the file HOLA_SITE if that is set, else slurm/site.sh if there is one.
# Sourced in the repository's root, by the batch scripts on the first node and by on_node.sh on every node.
# shellcheck disable=SC2034
HOLA_SRUN=() HOLA_RUN=()
if [ -n "${HOLA_SITE:-}" ] && [ ! -f "$HOLA_SITE" ]; then
    echo "slurm | HOLA_SITE: ${SLURMD_NODENAME:-$(hostname)} has no file $HOLA_SITE; give a file on a disk that all" \
        "nodes share, or unset HOLA_SITE" >&2
    exit 2
fi
if [ -f "${HOLA_SITE:-slurm/site.sh}" ]; then
    set +u # functions of module systems read variables that are not set
    # shellcheck source=/dev/null
    source "${HOLA_SITE:-slurm/site.sh}"
    set -u
fi
