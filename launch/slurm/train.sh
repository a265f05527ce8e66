# What pretrain.sbatch and finetune.sbatch share: sourced by them, in the batch script of a job.
#
#     train MODULE ENGINE [options of MODULE]
#
# Starts one launcher a node, asks the run to stop when SLURM announces the job's end, and queues the job again when the
# run has left word that it is to go on. A launcher hides the exit status of its workers, and a signal to it would kill
# it: so the run records its processes, and the marker `requeue`, in its folder.

train() {
    local module=$1 engine=${2:-}
    if [ -z "$engine" ] || [[ $engine == -* ]]; then
        echo "error: start it by: sbatch [options of sbatch] launch/slurm/NAME.sbatch ENGINE [options of $module]" >&2
        exit 2
    fi
    shift 2
    export NODES=$SLURM_JOB_NUM_NODES PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # the address and not the name: names of nodes need not be names of hosts
    HEAD=${HEAD:-$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
    PORT=$((20000 + SLURM_JOB_ID % 20000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do PORT=$((PORT + 1)); done
    RUN_FILE=$(mktemp) # rank 0 is on this node, and writes the run folder's name there
    export HEAD PORT SCALETRANSFER_RUN_FILE=$RUN_FILE
    trap 'rm -f "$RUN_FILE"' EXIT

    echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $engine on $NODES x $PROCESSES processes," \
        "$SLURM_JOB_NODELIST ($HEAD:$PORT)"
    EARLY=0
    trap ask_to_stop USR1 # by --signal=B:USR1@...
    trap : TERM           # preemption and scancel: the run has got it as well, and this script still has to look
    # one task a node; when one fails the others are of no use
    srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' node.sh "$SCALETRANSFER_LAUNCH/node.sh" "$engine" "$module" "$@" &
    SRUN=$!
    local status=0
    while true; do
        wait "$SRUN" && status=0 || status=$?
        kill -0 "$SRUN" 2>/dev/null || break # else a signal has interrupted the waiting only
    done
    wait "$SRUN" && status=0 || status=$?
    finish "$status"
}

# The job's time is nearly over: SIGUSR1 to one of the run's processes stops all.
ask_to_stop() {
    local folder rank host process
    folder=$(cat "$RUN_FILE")
    echo "$(date '+%F %T') SIGUSR1: asking the run to stop (${folder:-it has not begun})"
    if [ -n "$folder" ] && [ -f "$folder/processes" ]; then
        while read -r rank host process; do
            if [ "$host" = "$SLURMD_NODENAME" ] && kill -USR1 "$process"; then return; fi
        done <"$folder/processes"
    elif [ -z "$folder" ]; then
        EARLY=1 # nothing to save
        kill -TERM "$SRUN"
    fi
}

# The run has ended: queue the job again, or say how it ended and leave its status.
finish() {
    local status=$1 folder state
    folder=$(cat "$RUN_FILE")
    if [ "$EARLY" = 1 ] || { [ -n "$folder" ] && [ -f "$folder/requeue" ]; }; then
        # a job that somebody cancelled is no longer RUNNING, and shall not come back
        state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')
        if [ "$state" = RUNNING ]; then
            echo "$(date '+%F %T') stopped (${folder:-before it began}): queued again"
            if scontrol requeue "$SLURM_JOB_ID"; then
                trap - TERM USR1
                sleep 300 # the controller ends this script; if it ended by itself, the job might count as failed
                exit 75
            fi
            echo "note: this job cannot be queued again; the same sbatch command goes on" >&2
        else
            echo "$(date "+%F %T") stopped; the job is over ($state): the same sbatch command goes on"
        fi
        exit 75
    fi
    if [ -n "$folder" ] && [ -f "$folder/failed" ]; then
        echo "error: $(cat "$folder/failed")" >&2 # again, behind what launchers print
    fi
    exit "$status"
}
