#!/usr/bin/env bash
# slurm/on_node.sh COMMAND...: the command in the environment that the site file makes on this node.
# srun starts it once a node, so that modules are loaded where the ranks run. What the batch script has loaded on the
# first node comes along as plain variables; what depends on the node is set anew here.
set -uo pipefail
source slurm/read_site.sh
exec "$@"
