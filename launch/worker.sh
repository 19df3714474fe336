#!/usr/bin/env bash
# What tpu_vm.sh calls on every worker; works on any machine. Runs a command that outlives the connection, and runs it again when it
# ends with 75: "stopped and saved, run me again". One run at a time.
#   start -- COMMAND ...    in the background; an error if one is running
#   resume -- COMMAND ...   the same; if one is running it is left alone
#   status                  running, or how it ended; always exit status 0
#   log [LINES]             its output, followed
#   stop                    SIGTERM, so that it saves; waits for its end
# Output and state: $BLIP_JAX_RUN_DIR, by default ~/blip_jax_run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${BLIP_JAX_RUN_DIR:-$HOME/blip_jax_run}"
again=75      # exit status of blip-jax after an interruption, as sysexits.h's EX_TEMPFAIL
most=100      # restarts without a person looking
pause="${BLIP_JAX_PAUSE:-5}"  # seconds before a restart: the other workers end too

fail() {
    echo "error: $(hostname): $*" >&2
    exit 2
}

running() {
    [ -s "$folder/pid" ] && kill -0 "$(cat "$folder/pid")" 2>/dev/null
}

start() {
    if [ $# -eq 0 ]; then fail "nothing to run: give it after --"; fi
    mkdir -p "$folder"
    rm -f "$folder/ended"
    export PATH="$root/.venv/bin:$PATH"
    cd "$root"
    nohup setsid bash "$root/launch/worker.sh" loop "$@" >> "$folder/log" 2>&1 < /dev/null &
    echo $! > "$folder/pid"
    echo "$(hostname): started, output in $folder/log"
}

# The background process. A trap interrupts `wait`, which then has a status of its own: the child's is asked for again.
loop() {
    local status child="" restarts=0 stopping=""
    trap 'stopping=yes; kill -TERM "$child" 2>/dev/null || true' TERM
    while :; do
        echo "== $(date -u +%FT%TZ) $*"
        "$@" &
        child=$!
        while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
        status=0
        wait "$child" || status=$?
        echo "== $(date -u +%FT%TZ) ended with $status"
        if [ "$status" -ne "$again" ] || [ -n "$stopping" ]; then break; fi
        if [ "$restarts" -ge "$most" ]; then echo "== $most restarts are enough"; break; fi
        restarts=$((restarts + 1))
        sleep "$pause" &
        wait $! || true
        if [ -n "$stopping" ]; then break; fi
    done
    echo "$status" > "$folder/ended"
    exit "$status"
}

status() {
    if running; then
        echo "$(hostname): running"
    elif [ -s "$folder/ended" ]; then
        echo "$(hostname): ended with $(cat "$folder/ended")"
    elif [ -s "$folder/pid" ]; then
        echo "$(hostname): killed"
    else
        echo "$(hostname): nothing was started"
    fi
}

stop() {
    if running; then
        kill -TERM "$(cat "$folder/pid")"
        while running; do sleep 0.2; done
    fi
    status
}

command="${1:-}"
shift || true
if [ "${1:-}" = -- ]; then shift; fi
case "$command" in
    start)
        if running; then fail "already running, process $(cat "$folder/pid"): stop it first"; fi
        start "$@" ;;
    resume)
        if running; then status; else start "$@"; fi ;;
    loop) loop "$@" ;;
    status) status ;;
    stop) stop ;;
    log) exec tail -n "${1:-50}" -F "$folder/log" ;;
    *) fail "unknown command '$command': start, resume, status, log or stop" ;;
esac
