# shellcheck shell=bash
# NCCL over AWS's Elastic Fabric Adapter. Copy the lines that you need into slurm/site.sh, which every node reads.
# Not tested: no such machine was at hand; names and meanings are those of AWS's and libfabric's documentation.
# NCCL reaches EFA through the plugin aws-ofi-nccl, which the EFA installer brings; the image of slurm/containers has
# none, so install both there, or mount the host's folders.

# The plugin (libnccl-net.so) and libfabric; the plugin's folder differs between releases: `find /opt -name 'libnccl-net*'`.
export LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib:${LD_LIBRARY_PATH:-}

# libfabric's provider; without it a missing EFA driver is a silent fall back to TCP.
export FI_PROVIDER=efa

# Lets processes fork, as data workers do, while memory is registered with the adapter; old releases need it.
export FI_EFA_FORK_SAFE=1

# The network on which ranks find each other (TCP): every one but these. Bridges of containers reach no other node.
export NCCL_SOCKET_IFNAME=^lo,docker,veth

# The interface for gloo, which reduces on CPUs only; one exact name, which is another on other instance types: here the
# one that this node's default route uses.
GLOO_SOCKET_IFNAME=$(ip -o route show default 2>/dev/null | sed -n '1s/.* dev \([^ ]*\).*/\1/p')
[ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME

# What NCCL chooses, in the job's log: "NET/OFI Selected provider is efa", or "NET/Socket" where it fell back to TCP.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
