#!/usr/bin/env bash
# BLIP on Cloud TPU VMs: one queued resource, one or several slices, the same command on every worker. launch/README.md tells the
# story. Needs gcloud, logged in; for more than one worker first `ssh-add ~/.ssh/google_compute_engine`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
    cat <<'END'
usage: bash launch/tpu_vm.sh COMMAND [flags] [-- what every worker runs]

  create    ask for the slices and wait until they are there (ends early, harmlessly, with Ctrl-C)
  install   clone --revision on every worker and install it with the extra [tpu]
  run       start what follows -- on every worker; it goes on when the connection ends, and again after exit status 75
  logs      follow the output of --worker
  status    of the queued resource, and of the run on every worker
  resume    from any state: create again what was preempted, install, run what does not run
  stop      SIGTERM: save, end, do not start again
  delete    give the slices back

  --name=     of the queued resource        TPU_NAME       --capacity=  on-demand, spot, reserved,   TPU_CAPACITY
  --project=                                TPU_PROJECT                 best-effort or flex-start
  --zone=     as us-west4-a                 TPU_ZONE       --repo=      that the workers clone: origin
  --type=     as v5litepod-16               TPU_TYPE       --revision=  commit to run: this clone's
  --slices=   1                             TPU_SLICES     --setup=     shell command on every worker before the install
  --runtime=  software version, by type     TPU_RUNTIME    --env=A=B    for the run, repeatable
  --worker=   of logs: 0, or all                           --dry-run    print the commands, run nothing
  --hours=    1 to 168, after which flex-start takes the   TPU_HOURS
              slices back; it has v5e and v6e
END
}

name="${TPU_NAME:-}" project="${TPU_PROJECT:-}" zone="${TPU_ZONE:-}" type="${TPU_TYPE:-}" slices="${TPU_SLICES:-1}"
runtime="${TPU_RUNTIME:-}" capacity="${TPU_CAPACITY:-on-demand}" hours="${TPU_HOURS:-}" repo="" revision="" setup="" worker=0
poll="${TPU_POLL:-30}"  # seconds between two looks at a request that waits
check_settings() {
    local variable
    check "--name (TPU_NAME)" "$name" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' "a name of small letters, digits and dashes"
    check "--project (TPU_PROJECT)" "$project" '[a-z0-9][a-z0-9.:-]+' "the id of a Google Cloud project"
    check "--zone (TPU_ZONE)" "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, as us-west4-a"
    check "--worker" "$worker" '[0-9]+|all' "a number or all"
    for variable in "${environment[@]+"${environment[@]}"}"; do
        check "--env" "$variable" '[A-Za-z_][A-Za-z0-9_]*=.*' "NAME=VALUE"
    done
    case "$command" in create | resume) check_hardware ;; esac
    case "$command" in install | resume) settle_revision ;; esac
    case "$command" in
        run | resume) check "what to run" "${what[*]+"${what[*]}"}" '.+' "the command after --, as -- blip-jax train --config=..." ;;
        *) if [ "${#what[@]}" -gt 0 ]; then problems+=("$command runs nothing on the workers: leave out what follows --"); fi ;;
    esac
    no_problems
}

# The accelerator type, and the runtime that belongs to it (cloud.google.com/tpu/docs/runtimes).
check_hardware() {
    local two='1|4|8|16|32|64|128|256'
    check "--slices (TPU_SLICES)" "$slices" '[1-9][0-9]*' "a number from 1"
    check "--capacity (TPU_CAPACITY)" "$capacity" 'on-demand|spot|reserved|best-effort|flex-start' \
        "on-demand, spot, reserved, best-effort or flex-start"
    if [ "$capacity" = flex-start ]; then
        check "--hours (TPU_HOURS)" "$hours" '[1-9]|[1-9][0-9]|1[0-5][0-9]|16[0-8]' "1 to 168, how long flex-start lends the slices"
        case "$type" in v5litepod-* | v6e-*) ;; *) problems+=("--type is '$type': flex-start has v5litepod-N and v6e-N") ;; esac
    fi
    case "$type" in
        v7x-* | tpu7x-* | v7-*) problems+=("--type is '$type': TPU7x is not offered as a TPU VM: use launch/tpu_mig.sh or launch/gke_xpk.sh") ; return ;;
        v5e-* | v5lite-*) problems+=("--type is '$type': Cloud TPU calls it v5litepod-${type##*-}") ; return ;;
    esac
    check "--type (TPU_TYPE)" "$type" "(v5litepod|v6e)-($two)|(v2|v3|v4|v5p)-[1-9][0-9]*" \
        "an accelerator type: v5litepod-N or v6e-N with N chips of 1, 4, 8, ... 256, or v4-N, v5p-N with N cores, two a chip"
    if [[ "$type" =~ ^(v2|v3|v4|v5p)-([1-9][0-9]*)$ ]] && [ $((BASH_REMATCH[2] % 8)) -ne 0 ]; then
        problems+=("--type is '$type': ${BASH_REMATCH[1]} is counted in cores, 8 on each host: expected a multiple of 8")
    fi
    if [ -z "$runtime" ]; then
        case "$type" in
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            *) runtime=tpu-ubuntu2204-base ;;
        esac
    fi
}

# queued [alpha] VERB args: gcloud's queued resources of the project and zone.
queued() {
    local track=()
    if [ "$1" = alpha ]; then track=(alpha); shift; fi
    execute gcloud "${track[@]+"${track[@]}"}" compute tpus queued-resources "$1" "$name" "--project=$project" "--zone=$zone" "${@:2}"
}

# on_workers WHICH COMMAND: through ssh, on worker WHICH (or all) of every slice; of the first slice where WHICH is a number.
on_workers() {
    local node=all
    if [ "$1" != all ]; then node=0; fi
    queued ssh "--node=$node" "--worker=$1" "--command=$2"
}

# Prints the state; "none" where there is no such queued resource.
state() {
    local said
    if said="$(gcloud compute tpus queued-resources describe "$name" "--project=$project" "--zone=$zone" \
        '--format=value(state.state)' 2>&1)"; then
        echo "$said"
    elif [[ "$said" == *NOT_FOUND* ]]; then
        echo none
    else
        fail "gcloud cannot describe $name: $said"
    fi
}

create() {
    local nodes=("--node-id=$name") tier=() track=()
    if [ "$slices" -gt 1 ]; then nodes=("--node-count=$slices" "--node-prefix=$name"); fi
    case "$capacity" in
        on-demand) ;;
        flex-start) tier=(--provisioning-model=flex-start "--max-run-duration=${hours}h") ;;
        *) tier=("--$capacity") ;;
    esac
    case "$capacity" in best-effort | flex-start) track=(alpha) ;; esac  # these flags are not in the stable commands
    queued "${track[@]+"${track[@]}"}" create "--accelerator-type=$type" "--runtime-version=$runtime" "${nodes[@]}" \
        "${tier[@]+"${tier[@]}"}"
}

wait_until_active() {
    local now="" before=""
    if [ -n "$dry_run" ]; then
        remark "until this says ACTIVE:"
        queued describe '--format=value(state.state)'
        return
    fi
    while :; do
        now="$(state)"
        if [ "$now" != "$before" ]; then echo "$(date -u +%FT%TZ) $name is $now"; fi
        case "$now" in
            ACTIVE) return ;;
            none) fail "$name does not exist: \`create\` asks for it" ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING) fail "$name is $now: \`resume\` asks for it again" ;;
        esac
        before="$now"
        sleep "$poll"
    done
}

install() {
    on_workers all "$(install_line "$setup")"
}

# start VERB: `start` or `resume` of worker.sh.
start() {
    local line=""
    if [ "${#environment[@]}" -gt 0 ]; then line="env $(quoted "${environment[@]}") "; fi
    on_workers all "cd ~/blip_jax && ${line}bash launch/worker.sh $1 -- $(quoted "${what[@]}")"
}

# A preempted queued resource does not come back by itself: it is deleted and asked for again.
resume() {
    local now=""
    if [ -n "$dry_run" ]; then
        remark "if this says SUSPENDED or FAILED:"
        queued describe '--format=value(state.state)'
        queued delete --force --quiet
        remark "if that was so, or there was none:"
        create
    else
        now="$(state)"
        while [ "$now" = SUSPENDING ] || [ "$now" = DELETING ]; do
            echo "$name is $now"
            sleep "$poll"
            now="$(state)"
        done
        case "$now" in SUSPENDED | FAILED) echo "$name is $now: asking for it again"; queued delete --force --quiet; now=none ;; esac
        if [ "$now" = none ]; then create; fi
    fi
    wait_until_active
    install
    start resume
}

status() {
    local now=ACTIVE
    if [ -n "$dry_run" ]; then
        queued describe '--format=value(state.state)'
        remark "if this says ACTIVE:"
    else
        now="$(state)"
        echo "$name is $now"
    fi
    if [ "$now" = ACTIVE ]; then on_workers all "cd ~/blip_jax && bash launch/worker.sh status"; fi
}

command="${1:-help}"
shift || true
case "$command" in
    create | install | run | logs | status | resume | stop | delete) ;;
    help | --help | -h) usage; exit ;;
    *) fail "unknown command '$command': create, install, run, logs, status, resume, stop or delete" ;;
esac
parse "name project zone type slices runtime capacity hours repo revision setup worker" "$@"
check_settings
need_program gcloud "install the Google Cloud CLI, then \`gcloud auth login\`"
case "$command" in
    create) create; wait_until_active ;;
    install) install ;;
    run) start start ;;
    logs) on_workers "$worker" "cd ~/blip_jax && bash launch/worker.sh log" ;;
    status) status ;;
    resume) resume ;;
    stop) on_workers all "cd ~/blip_jax && bash launch/worker.sh stop" ;;
    delete) queued delete --force --quiet ;;
esac
