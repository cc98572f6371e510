# shellcheck shell=bash
# NCCL over RoCE (RDMA over Ethernet). Copy the lines that your cluster needs into slurm/site.sh, which every node reads.
# Not tested: no machine with RoCE was at hand; names and meanings are those of NVIDIA's NCCL documentation.
# Traffic class and lossless queues are a property of the switches: ask who runs the network for their values.

# The adapters of the compute network (`show_gids` or `rdma link` lists them).
export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

# The network on which ranks find each other (TCP), by the beginning of the interface's name.
export NCCL_SOCKET_IFNAME=eth0

# The same for gloo, which reduces on CPUs only; one exact name.
export GLOO_SOCKET_IFNAME=eth0

# The address of an adapter that is used: the row of `show_gids` with RoCE v2 and the IPv4 address. Recent NCCL finds it
# by itself; a wrong one is a connection that hangs or a "Call to ibv_modify_qp failed".
# export NCCL_IB_GID_INDEX=3

# The traffic class that the switches treat as lossless, 4 * DSCP; 106 stands for DSCP 26 with ECN.
# export NCCL_IB_TC=106

# Waiting time for an answer, 4.096 us * 2^N: larger values get over paused queues.
# export NCCL_IB_TIMEOUT=22

# Adapters lock memory, and a batch system may hand down a small limit: raise it as far as this node allows.
ulimit -l "$(ulimit -H -l)"

# What NCCL chooses, in the job's log: "NET/IB ... RoCE" for adapters, "NET/Socket" where it fell back to TCP.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
