# shellcheck shell=bash
# NCCL over InfiniBand. Copy the lines that your cluster needs into slurm/site.sh, which every node reads.
# Not tested: no machine with InfiniBand was at hand; names and meanings are those of NVIDIA's NCCL documentation.
# NCCL finds adapters by itself, so measure without any of these first: sbatch --nodes=2 slurm/doctor.sh.

# The adapters of the compute network, by the beginning of their names (`ibstat -l`); without it storage and management
# adapters are used as well. `=mlx5_0:1` is exactly this port, `^mlx5_bond` all but these.
export NCCL_IB_HCA=mlx5

# The network on which ranks find each other (TCP), by the beginning of the interface's name. It need not be fast.
export NCCL_SOCKET_IFNAME=ib0

# The same for gloo, which reduces on CPUs only; one exact name.
export GLOO_SOCKET_IFNAME=ib0

# Waiting time for an answer, 4.096 us * 2^N: larger values get over switches that are busy or reroute.
# export NCCL_IB_TIMEOUT=22

# Connections between two adapters: more than one spreads traffic over more paths of a network with static routes.
# export NCCL_IB_QPS_PER_CONNECTION=4

# The service level, where the fabric's manager routes adaptively on one of them; ask who runs it.
# export NCCL_IB_SL=1

# Adapters lock memory, and a batch system may hand down a small limit: raise it as far as this node allows.
ulimit -l "$(ulimit -H -l)"

# What NCCL chooses, in the job's log: "NET/IB" for adapters, "NET/Socket" where it fell back to TCP.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
