#!/usr/bin/env bash
# BLIP on TPUs of Google Kubernetes Engine through xpk (`pip install xpk`): a cluster, a shared disk, workloads that restart by
# themselves after a preemption. launch/README.md tells the story. TPU7x goes this way, or by tpu_mig.sh. Needs xpk, gcloud and kubectl;
# docker for `image`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
    cat <<'END'
usage: bash launch/gke_xpk.sh COMMAND [flags] [-- what every worker runs]

  image     build launch/Dockerfile of this clone as --image, with docker, and push it
  cluster   create the cluster with its slices, or change their number
  disk      create a Filestore disk that all workers see under --mount: the place of workdir and data
  run       submit the workload; it starts again after exit status 75, and when a worker is lost
  status    of the workload
  logs      follow the output of --worker of the first slice, or of all
  stop      delete the workload; its workers get SIGTERM and save
  delete    delete the cluster

  --cluster=   name                          GKE_CLUSTER     --capacity=  on-demand, spot, flex, or the     GKE_CAPACITY
  --workload=  name of the run               GKE_WORKLOAD                 name of a reservation: reservation=NAME
  --project=                                 GKE_PROJECT     --disk=      name of the disk                  GKE_DISK
  --zone=      as us-west4-a                 GKE_ZONE        --mount=     where workers see it: /shared
  --type=      as v5litepod-16, tpu7x-16     GKE_TYPE        --size=      of the disk: 1024 (GB)
  --slices=    1                             GKE_SLICES      --restarts=  50
  --image=     with blip-jax in it, as `image` makes it, so that no start installs anything;          GKE_IMAGE
               default: python:3.12, which clones --repo at --revision and installs it at every start
  --repo=      that the workers clone: origin                --revision=  commit to run: this clone's
  --worker=    of logs: 0, or all                            --env=A=B    for the run, repeatable
  --dry-run    print the commands, run nothing
END
}

cluster="${GKE_CLUSTER:-}" workload="${GKE_WORKLOAD:-}" project="${GKE_PROJECT:-}" zone="${GKE_ZONE:-}" type="${GKE_TYPE:-}"
slices="${GKE_SLICES:-1}" capacity="${GKE_CAPACITY:-on-demand}" disk="${GKE_DISK:-}" mount=/shared size=1024 restarts=50
image="${GKE_IMAGE:-}" repo="" revision="" worker=0
check_settings() {
    local variable kubernetes='[a-z]([a-z0-9-]{0,38}[a-z0-9])?' its="a name of small letters, digits and dashes, 40 at most"
    if [ "$command" = image ]; then
        check "--image (GKE_IMAGE)" "$image" '[a-z0-9.:-]+(/[a-z0-9._-]+)+(:[A-Za-z0-9._-]+)?' \
            "where to push it, as us-central1-docker.pkg.dev/my-project/images/blip_jax:1"
        no_problems
        return
    fi
    check "--cluster (GKE_CLUSTER)" "$cluster" "$kubernetes" "$its"
    check "--project (GKE_PROJECT)" "$project" '[a-z0-9][a-z0-9.:-]+' "the id of a Google Cloud project"
    check "--zone (GKE_ZONE)" "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, as us-west4-a"
    case "$command" in run | status | logs | stop) check "--workload (GKE_WORKLOAD)" "$workload" "$kubernetes" "$its" ;; esac
    case "$command" in
        cluster | run)
            check "--slices (GKE_SLICES)" "$slices" '[1-9][0-9]*' "a number from 1"
            check "--type (GKE_TYPE)" "$type" '(v4|v5p|v5litepod|v6e|tpu7x)-[1-9][0-9]*([a-z0-9x-]*)' \
                "a TPU type of xpk: v5litepod-16, v6e-256, v5p-128, tpu7x-16, ..." ;;
    esac
    case "$command" in
        cluster) check "--capacity (GKE_CAPACITY)" "$capacity" 'on-demand|spot|flex|reservation=.+' \
            "on-demand, spot, flex or reservation=NAME" ;;
        disk)
            check "--disk (GKE_DISK)" "$disk" "$kubernetes" "$its"
            check "--mount" "$mount" '/[A-Za-z0-9_./-]+' "an absolute path"
            check "--size" "$size" '[1-9][0-9]*' "gigabytes" ;;
        run)
            check "--restarts" "$restarts" '[0-9]+' "a number"
            check "what to run" "${what[*]+"${what[*]}"}" '.+' "the command after --, as -- blip-jax train --config=..."
            for variable in "${environment[@]+"${environment[@]}"}"; do
                check "--env" "$variable" '[A-Za-z_][A-Za-z0-9_]*=.*' "NAME=VALUE"
            done
            if [ -z "$image" ]; then settle_revision; fi ;;
        logs) check "--worker" "$worker" '[0-9]+|all' "a number or all" ;;
    esac
    if [ "$command" != run ] && [ "${#what[@]}" -gt 0 ]; then problems+=("$command runs nothing: leave out what follows --"); fi
    no_problems
}

# xpk_to NOUN VERB args: with the place that every command names.
xpk_to() {
    execute xpk "$1" "$2" "--cluster=$cluster" "--project=$project" "--zone=$zone" "${@:3}"
}

# What is not committed is in the image, too; a run says its commit, and that it is dirty.
image() {
    if [ -z "$dry_run" ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
        echo "warning: the image will hold changes that no commit has" >&2
    fi
    execute docker build "--file=$root/launch/Dockerfile" --build-arg=EXTRA=tpu,gcs "--tag=$image" "$root"
    execute docker push "$image"
}

# 75 is blip-jax's "stopped and saved, run me again"; xpk itself restarts on the statuses of signals. exec, so that SIGTERM reaches
# the run and not a shell; five minutes to save.
run() {
    local flags=() variable line=""
    if [ -n "$image" ]; then
        flags+=("--docker-image=$image")
    else
        flags+=("--docker-image=python:3.12")
        # a clone or an install that failed, as a network does, is tried again by a restart, and does not end the run
        line="{ git clone --quiet $(quoted "$repo") /blip_jax && cd /blip_jax && git checkout --quiet --detach $revision"
        line+=" && pip install --quiet -e '.[tpu]'; } || exit 75; "
    fi
    if [ -n "$disk" ]; then flags+=("--storage=$disk"); fi
    for variable in "${environment[@]+"${environment[@]}"}"; do flags+=("--env=$variable"); done
    xpk_to workload create "--workload=$workload" "--tpu-type=$type" "--num-slices=$slices" "--max-restarts=$restarts" \
        --restart-on-exit-codes=75 --termination-grace-period-seconds=300 "${flags[@]}" "--command=${line}exec $(quoted "${what[@]}")"
}

logs() {
    local which="jobset.sigs.k8s.io/jobset-name=$workload"
    if [ "$worker" != all ]; then which+=",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=$worker"; fi
    execute gcloud container clusters get-credentials "$cluster" "--project=$project" "--location=${zone%-*}"
    execute kubectl logs --follow --prefix --tail=50 --max-log-requests=1000 "--selector=$which"
}

command="${1:-help}"
shift || true
case "$command" in
    image | cluster | disk | run | status | logs | stop | delete) ;;
    help | --help | -h) usage; exit ;;
    *) fail "unknown command '$command': image, cluster, disk, run, status, logs, stop or delete" ;;
esac
parse "cluster workload project zone type slices capacity disk mount size restarts image repo revision worker" "$@"
check_settings
case "$command" in
    image) need_program docker "or build launch/Dockerfile with another program" ;;
    logs) need_program kubectl "install it with \`gcloud components install kubectl\`" ;;
    *) need_program xpk "pip install xpk" ;;
esac
case "$command" in
    image) image ;;
    cluster) xpk_to cluster create "--tpu-type=$type" "--num-slices=$slices" "--$capacity" ;;
    disk) xpk_to storage create "$disk" --type=gcpfilestore "--size=$size" --vol=default "--mount-point=$mount" --readonly=false \
        --auto-mount=false ;;
    run) run ;;
    status) xpk_to workload list "--filter-by-job=$workload" ;;
    logs) logs ;;
    stop) xpk_to workload delete "--workload=$workload" --force ;;
    delete) xpk_to cluster delete ;;
esac
