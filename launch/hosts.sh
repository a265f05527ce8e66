#!/bin/bash
# Training on several hosts without a batch system: a launcher on each, by ssh.
#
#     PROCESSES=8 bash launch/hosts.sh HOSTFILE zero2 --config configs/chexpert_bit50x1.yaml
#     PROCESSES=8 MODULE=scaletransfer.finetune bash launch/hosts.sh HOSTFILE ddp --finetune-config FILE --logdir DIR
#
# HOSTFILE: one host a line, and behind it, where the others reach it by another name, its address. Empty lines and
# lines that begin with # do not count. The engine is a file in launch/; launch/README.md says which to choose.
# Start it in the checkout, on any machine that reaches the hosts; each must have the same folder at the same path.
#
# PROCESSES: of each host (as a rule its GPUs). PORT: free on the first host. REMOTE: what runs a command on a host
# (`ssh -o BatchMode=yes`; it gets the host and the command). Ctrl-C, SIGTERM or SIGUSR1 stops the run after its step,
# saved; the same command goes on. Exit status: 0 done, 75 stopped and saved, else failed.

set -uo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "usage: PROCESSES=N bash launch/hosts.sh HOSTFILE ENGINE [options of scaletransfer pretrain]" >&2
    exit 2
fi
mapfile -t LINES < <(grep -Ev '^[[:space:]]*(#|$)' "$1")
ENGINE=$2
shift 2
NODES=${#LINES[@]}
if [ "$NODES" = 0 ]; then
    echo "error: the host file names no host" >&2
    exit 2
fi
read -r -a REMOTE <<<"${REMOTE:-ssh -o BatchMode=yes}"
read -r FIRST HEAD <<<"${LINES[0]}"
HEAD=${HEAD:-$FIRST}
PROCESSES=${PROCESSES:-1} PORT=${PORT:-$((20000 + RANDOM % 10000))} MODULE=${MODULE:-scaletransfer.pretrain}
GRACE=${GRACE:-60} # seconds that the other hosts have when one has ended

# on the first host, where rank 0 is: it writes there which folder it trains in
RUN_FILE=/tmp/scaletransfer-run-$$-$RANDOM
FOLDER=
WAITERS=()

on() { # HOST COMMAND...
    local host=$1
    shift
    "${REMOTE[@]}" "$host" "$(printf '%q ' "$@")" </dev/null
}

# Where the run is. Asked while it lives: its processes are recorded only then.
find_folder() {
    FOLDER=$(on "$FIRST" cat "$RUN_FILE" 2>/dev/null)
}

# One process is enough: all stop together.
ask_to_stop() {
    find_folder
    local rank host process
    if read -r rank host process < <(on "$FIRST" cat "$FOLDER/processes" 2>/dev/null); then
        echo "asking the run to stop after its step"
        on "$FIRST" kill -USR1 "$process"
    else
        echo "the run has not begun: ending it"
        kill "${WAITERS[@]}" 2>/dev/null
    fi
}
trap ask_to_stop INT TERM USR1

number=0
for line in "${LINES[@]}"; do
    read -r host _ <<<"$line"
    # in a session of its own: Ctrl-C shall reach this script alone
    command=(env "NODES=$NODES" "NODE_RANK=$number" "HEAD=$HEAD" "PORT=$PORT" "PROCESSES=$PROCESSES")
    command+=("SCALETRANSFER_RUN_FILE=$RUN_FILE" bash "$HERE/node.sh" "$ENGINE" "$MODULE" "$@")
    setsid "${REMOTE[@]}" "$host" "cd $(printf '%q' "$PWD") && exec $(printf '%q ' "${command[@]}")" </dev/null &
    WAITERS+=($!)
    number=$((number + 1))
done

# The first host to end decides when the others have to: they have noticed by themselves, or never will.
status=0
alive() { kill -0 "$1" 2>/dev/null; }
deadline=
while true; do
    left=0
    for waiter in "${WAITERS[@]}"; do if alive "$waiter"; then left=$((left + 1)); fi; done
    if [ "$left" = 0 ]; then break; fi
    if [ "$left" -lt "$NODES" ] && [ -z "$deadline" ]; then deadline=$((SECONDS + GRACE)); fi
    if [ -n "$deadline" ] && [ "$SECONDS" -gt "$deadline" ]; then
        echo "note: a host ended $GRACE s ago, others have not: killing what the run recorded of them" >&2
        find_folder
        on "$FIRST" cat "$FOLDER/processes" 2>/dev/null | while read -r _ host process; do
            for line in "${LINES[@]}"; do
                if [ "${line%% *}" = "$host" ]; then on "$host" kill -KILL "$process"; fi
            done
        done
        kill "${WAITERS[@]}" 2>/dev/null
        deadline=$((SECONDS + GRACE))
    fi
    sleep 1 &
    wait $! # so that a signal is taken at once
done
for waiter in "${WAITERS[@]}"; do
    wait "$waiter" || status=1
done

find_folder
if [ "$status" != 0 ] && [ -n "$FOLDER" ]; then
    if on "$FIRST" test -f "$FOLDER/requeue"; then
        echo "stopped and saved: the same command goes on"
        status=75
    elif on "$FIRST" test -f "$FOLDER/failed"; then
        echo "error: $(on "$FIRST" cat "$FOLDER/failed")" >&2 # again, behind what launchers print
    fi
fi
on "$FIRST" rm -f "$RUN_FILE"
exit "$status"
