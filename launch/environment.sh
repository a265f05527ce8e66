# What every script in launch/ sources before it starts a program: SLURM jobs and hosts reached by ssh, on each host.
# This is the one place to say what a login shell of yours would need before `scaletransfer` runs.

# module load python/3.11
# source /path/to/venv/bin/activate
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi # of the checkout, made by `make install`

# What stands before each program: nothing, or a container (launch/container/scaletransfer.def is the recipe of one).
CONTAINER=()
# CONTAINER=(apptainer exec --nv --bind /data /path/to/scaletransfer.sif)

# The network, where there are several: the interface over which hosts reach each other.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
