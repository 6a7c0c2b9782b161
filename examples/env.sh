# Sourced by bash on every host before its ranks start (--env-file).

# The interface that joins the hosts: of gloo (control messages, and all of them on CPUs), of NCCL.
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
