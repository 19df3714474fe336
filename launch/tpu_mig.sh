#!/usr/bin/env bash
# BLIP on TPUs of Compute Engine: TPU7x, v6e and v5p as one managed instance group, a slice whose hosts come all at once or not at all.
# launch/README.md tells the story. Needs gcloud, logged in. The flags are as gcloud's reference and guides of 2026 have them; none
# of this was run on a cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
    cat <<'END'
usage: bash launch/tpu_mig.sh COMMAND [flags] [-- what every worker runs]

  create    policy, template and group of the slice, and wait until its hosts are there
  install   clone --revision on every worker and install it with the extra [tpu]
  run       start what follows -- on every worker; it goes on when the connection ends, and again after exit status 75
  logs      follow the output of --worker
  status    of the hosts, and of the run on every worker
  stop      SIGTERM: save, end, do not start again
  delete    give the slice back: group, template, policy

  --name=      of all three                  TPU_NAME       --capacity=  on-demand, spot, flex-start,       TPU_CAPACITY
  --project=                                 TPU_PROJECT                 or reservation=NAME
  --zone=      as us-central1-c              TPU_ZONE       --hours=     1 to 168: flex-start's              TPU_HOURS
  --type=      tpu7x, v6e or v5p             TPU_TYPE       --setup=     shell command on every worker before the install
  --topology=  of chips, as 2x2x2; v6e 4x4   TPU_TOPOLOGY   --env=A=B    for the run, repeatable
  --disk=      of a host: 200 (GB)                          --repo=      that the workers clone: origin
  --worker=    of logs: 0, or all                           --revision=  commit to run: this clone's
  --dry-run    print the commands, run nothing
END
}

name="${TPU_NAME:-}" project="${TPU_PROJECT:-}" zone="${TPU_ZONE:-}" type="${TPU_TYPE:-}" topology="${TPU_TOPOLOGY:-}"
capacity="${TPU_CAPACITY:-on-demand}" hours="${TPU_HOURS:-}" disk=200 repo="" revision="" setup="" worker=0
chips_of_a_host=4
check_settings() {
    local variable
    check "--name (TPU_NAME)" "$name" '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' "a name of small letters, digits and dashes, 50 at most"
    check "--project (TPU_PROJECT)" "$project" '[a-z0-9][a-z0-9.:-]+' "the id of a Google Cloud project"
    check "--zone (TPU_ZONE)" "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, as us-central1-c"
    check "--worker" "$worker" '[0-9]+|all' "a number or all"
    for variable in "${environment[@]+"${environment[@]}"}"; do
        check "--env" "$variable" '[A-Za-z_][A-Za-z0-9_]*=.*' "NAME=VALUE"
    done
    case "$command" in
        create) check_hardware ;;
        install) settle_revision ;;
        run) check "what to run" "${what[*]+"${what[*]}"}" '.+' "the command after --, as -- blip-jax train --config=..." ;;
    esac
    if [ "$command" != run ] && [ "${#what[@]}" -gt 0 ]; then
        problems+=("$command runs nothing on the workers: leave out what follows --")
    fi
    no_problems
}

# Leaves $machine, $images and $hosts.
check_hardware() {
    local chips=1 side sides
    check "--type (TPU_TYPE)" "$type" 'tpu7x|v6e|v5p' "tpu7x, v6e or v5p"
    case "$type" in
        v6e) sides='[1-9][0-9]*x[1-9][0-9]*' ;;
        *) sides='[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*' ;;
    esac
    check "--topology (TPU_TOPOLOGY)" "$topology" "$sides" "numbers of chips, as 2x2x2, or 4x4 of v6e"
    check "--capacity (TPU_CAPACITY)" "$capacity" 'on-demand|spot|flex-start|reservation=.+' \
        "on-demand, spot, flex-start or reservation=NAME"
    check "--disk" "$disk" '[1-9][0-9]+' "gigabytes, 10 at least"
    if [ "$capacity" = flex-start ]; then
        check "--hours (TPU_HOURS)" "$hours" '[1-9]|[1-9][0-9]|1[0-5][0-9]|16[0-8]' "1 to 168, how long flex-start lends the slice"
    fi
    no_problems
    for side in ${topology//x/ }; do chips=$((chips * side)); done
    if [ $((chips % chips_of_a_host)) -ne 0 ]; then
        problems+=("--topology is '$topology': expected a multiple of $chips_of_a_host chips, which a host has")
    fi
    hosts=$((chips / chips_of_a_host))
    case "$type" in
        tpu7x) machine=tpu7x-standard-4t images=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
        v6e) machine=ct6e-standard-4t images=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
        v5p) machine=ct5p-hightpu-4t images=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    esac
}

# of NOUN VERB args: a command of gcloud compute about the thing called $name.
compute() {
    execute gcloud compute "${@:1:2}" "$name" "--project=$project" "${@:3}"
}

group() {
    execute gcloud compute instance-groups managed "$1" "$name" "--project=$project" "--zone=$zone" "${@:2}"
}

create() {
    local region="${zone%-*}" lent=() placed=() boot=()
    case "$capacity" in
        spot) lent=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
        flex-start) lent=(--provisioning-model=FLEX_START "--max-run-duration=${hours}h" --instance-termination-action=DELETE
            --reservation-affinity=none) ;;
        reservation=*) lent=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE
            --reservation-affinity=specific "--reservation=${capacity#*=}") ;;
    esac
    if [ "$type" = tpu7x ]; then boot=(--boot-disk-type=hyperdisk-balanced); fi
    if [ "$hosts" -gt 1 ]; then  # the wires between hosts
        placed=("--workload-policy=projects/$project/regions/$region/resourcePolicies/$name")
        execute gcloud compute resource-policies create workload-policy "$name" "--project=$project" "--region=$region" \
            --type=high-throughput "--accelerator-topology=$topology"
    fi
    compute instance-templates create "--machine-type=$machine" --image-project=ubuntu-os-accelerator-images "--image-family=$images" \
        "--boot-disk-size=${disk}GB" "${boot[@]+"${boot[@]}"}" --maintenance-policy=TERMINATE --scopes=cloud-platform \
        "${lent[@]+"${lent[@]}"}"
    group create "--template=$name" "--size=$hosts" --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
        "${placed[@]+"${placed[@]}"}"
    group wait-until --stable
}

# Leaves $hosts_by_number: the names of the hosts, by the numbers that their TPUs have.
find_workers() {
    local host number hosts ask="curl --silent --fail --header Metadata-Flavor:Google"
    hosts_by_number=()
    if [ -n "$dry_run" ]; then
        remark "hosts, by the number that each gives as worker-id, here of two:"
        group list-instances '--format=value(NAME)'
        hosts_by_number=(HOST0 HOST1)
        return
    fi
    ask+=" http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-id"
    hosts="$(gcloud compute instance-groups managed list-instances "$name" "--project=$project" "--zone=$zone" '--format=value(NAME)')"
    if [ -n "$hosts" ] && [[ "$hosts" != *[[:space:]]* ]]; then hosts_by_number=("$hosts"); return; fi  # one
    for host in $hosts; do
        number="$(gcloud compute ssh "$host" "--project=$project" "--zone=$zone" "--command=$ask")" || number=""
        if ! [[ "$number" =~ ^[0-9]+$ ]]; then fail "host $host has no worker-id ('$number'): is it running, and part of the slice?"; fi
        hosts_by_number[number]="$host"
    done
    if [ "${#hosts_by_number[@]}" -eq 0 ]; then fail "$name has no hosts: \`create\` asks for them"; fi
}

# on_workers WHICH COMMAND: through ssh, on worker WHICH or all of them, side by side; %WORKER% in the command is its number.
on_workers() {
    local number status=0 waiting=()
    for number in "${!hosts_by_number[@]}"; do
        if [ "$1" != all ] && [ "$1" != "$number" ]; then continue; fi
        if [ -n "$dry_run" ]; then
            ssh_to "$number" "$2"
        else
            ssh_to "$number" "$2" &
            waiting+=($!)
        fi
    done
    for number in "${waiting[@]+"${waiting[@]}"}"; do wait "$number" || status=$?; done
    return "$status"
}

ssh_to() {
    execute gcloud compute ssh "${hosts_by_number[$1]}" "--project=$project" "--zone=$zone" "--command=${2//%WORKER%/$1}"
}

# Each is told where it stands, as its TPU numbers it; a host's name is an address within the project's network.
run() {
    local line=""
    if [ "${#environment[@]}" -gt 0 ]; then line="$(quoted "${environment[@]}") "; fi
    if [ "${#hosts_by_number[@]}" -gt 1 ]; then
        line+="BLIP_JAX_COORDINATOR=${hosts_by_number[0]}:8476 BLIP_JAX_PROCESSES=${#hosts_by_number[@]} BLIP_JAX_PROCESS=%WORKER% "
    fi
    on_workers all "cd ~/blip_jax && env ${line}bash launch/worker.sh resume -- $(quoted "${what[@]}")"
}

delete() {
    group delete --quiet
    compute instance-templates delete --quiet
    remark "of more than one host:"
    execute gcloud compute resource-policies delete "$name" "--project=$project" "--region=${zone%-*}" --quiet ||
        echo "no policy was deleted: a slice of one host has none" >&2
}

command="${1:-help}"
shift || true
case "$command" in
    create | install | run | logs | status | stop | delete) ;;
    help | --help | -h) usage; exit ;;
    *) fail "unknown command '$command': create, install, run, logs, status, stop or delete" ;;
esac
parse "name project zone type topology capacity hours disk repo revision setup worker" "$@"
check_settings
need_program gcloud "install the Google Cloud CLI, then \`gcloud auth login\`"
case "$command" in install | run | logs | status | stop) find_workers ;; esac
case "$command" in
    create) create ;;
    install) on_workers all "$(install_line "$setup")" ;;
    run) run ;;
    logs) on_workers "$worker" "cd ~/blip_jax && bash launch/worker.sh log" ;;
    status)
        group list-instances
        on_workers all "cd ~/blip_jax && bash launch/worker.sh status" ;;
    stop) on_workers all "cd ~/blip_jax && bash launch/worker.sh stop" ;;
    delete) delete ;;
esac
