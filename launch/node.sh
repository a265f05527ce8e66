#!/bin/bash
# One host's part of a run: its launcher, which starts a process for each of its GPUs. launch/slurm/*.sbatch and
# launch/hosts.sh call this on every host; nobody else needs to.
#
#     NODES=2 NODE_RANK=0 HEAD=10.0.0.1 PORT=29500 PROCESSES=8 bash launch/node.sh ENGINE MODULE [options of MODULE]
#
# ENGINE: a file in launch/ without .yaml (ddp, fsdp2, zero2, ...), or a path to one of yours.
# HEAD, PORT: where the first host (NODE_RANK 0) is reached by the others, and a port that is free there.
# PROCESSES: of each host.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/environment.sh"

ENGINE=$1 MODULE=$2
shift 2
FILE=$ENGINE
if [[ $ENGINE != *.yaml ]]; then FILE=$HERE/$ENGINE.yaml; fi
if [ ! -f "$FILE" ]; then
    echo "error: there is no engine file $FILE; there are $(cd "$HERE" && ls ./*.yaml | sed 's|^\./||; s|\.yaml$||' | xargs)" >&2
    exit 2
fi
TOTAL=$((NODES * PROCESSES))
if grep -q "^distributed_type: 'NO'" "$FILE" && [ "$TOTAL" != 1 ]; then
    echo "error: $ENGINE is for one process, but there are $NODES x $PROCESSES: choose ddp or another engine" >&2
    exit 2
fi

OPTIONS=(--config_file "$FILE" --num_processes "$TOTAL")
if grep -q "^parallelism_config:" "$FILE" && [ "$NODES" -gt 1 ]; then # hybrid: a group of ranks is a host
    OPTIONS+=(--parallelism_config_dp_replicate_size "$NODES" --parallelism_config_dp_shard_size "$PROCESSES")
fi
if [ "$NODES" -gt 1 ]; then
    # "standard": this script is started on every host already; DeepSpeed's own launchers would start themselves by ssh
    OPTIONS+=(--num_machines "$NODES" --machine_rank "$NODE_RANK" --main_process_ip "$HEAD" --main_process_port "$PORT")
    OPTIONS+=(--deepspeed_multinode_launcher standard)
fi

# A signal that reaches every process of a job reaches the launcher too. SIGUSR1 would end it and leave its workers
# behind: it shall ignore it; they take it for themselves. On SIGTERM it waits for them: long enough for a checkpoint.
trap '' USR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec "${CONTAINER[@]}" python -m accelerate.commands.launch "${OPTIONS[@]}" -m "$MODULE" "$@"
