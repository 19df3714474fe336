# Sourced by tpu_vm.sh, tpu_mig.sh and gke_xpk.sh: errors, quoting, and commands that --dry-run prints instead of running.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dry_run=""
problems=()
environment=()  # of --env
what=()         # that follows --

fail() {
    echo "error: $*" >&2
    exit 2
}

# The words, quoted where needed (of --flag=value the value), so that a shell reads them back as they are.
quoted() {
    local word flag out="" escaped="'\\''"
    for word; do
        flag=""
        if [[ "$word" =~ ^--[a-z_.-]+= ]]; then flag="${BASH_REMATCH[0]}"; fi
        word="${word#"$flag"}"
        if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]*$ ]] && [ -n "$flag$word" ]; then
            out+=" $flag$word"
        else
            out+=" $flag'${word//\'/$escaped}'"
        fi
    done
    printf '%s\n' "${out# }"
}

# Runs the command and shows it on stderr; in a dry run it is printed, to be pasted, and not run.
execute() {
    if [ -n "$dry_run" ]; then
        quoted "$@"
    else
        echo "== $(quoted "$@")" >&2
        "$@"
    fi
}

# What a dry run says between the commands.
remark() {
    if [ -n "$dry_run" ]; then echo "# $*"; fi
}

# parse "NAME ..." ARGUMENTS: --NAME=VALUE sets the variable NAME, if it is one of these; --env, --dry-run and -- are everybody's.
parse() {
    local known=" $1 " flag
    shift
    while [ $# -gt 0 ]; do
        flag="${1#--}" flag="${flag%%=*}"
        case "$1" in
            --env=*) environment+=("${1#*=}") ;;
            --dry-run) dry_run=yes ;;
            --)
                shift
                # shellcheck disable=SC2034  # read by the script that sources this
                what=("$@")
                return
                ;;
            --*=*) if [[ "$flag" != *" "* && "$known" = *" $flag "* ]]; then printf -v "$flag" '%s' "${1#*=}"; else unknown "$1"; fi ;;
            *) unknown "$1" ;;
        esac
        shift
    done
}

unknown() {
    problems+=("unknown flag '$1': bash launch/${0##*/} help lists them; what the workers run follows after --")
}

# check WHAT VALUE PATTERN EXPECTED: notes a problem unless the value matches the extended regular expression.
check() {
    if [ -z "$2" ]; then
        problems+=("$1 is missing: expected $4")
    elif ! [[ "$2" =~ ^($3)$ ]]; then
        problems+=("$1 is '$2': expected $4")
    fi
}

# Ends with all the problems noted, if there are any.
no_problems() {
    local problem
    if [ "${#problems[@]}" -eq 0 ]; then return; fi
    for problem in "${problems[@]}"; do echo "error: $problem" >&2; done
    exit 2
}

need_program() {
    if [ -z "$dry_run" ] && ! command -v "$1" >/dev/null; then fail "$1 is not on PATH: $2"; fi
}

# What all workers check out: $repo and $revision, by default this clone's origin and commit; a name becomes a full hash here, so
# that workers which start at different times run the same code.
settle_revision() {
    local hash
    repo="${repo:-$(git -C "$root" remote get-url origin 2>/dev/null || true)}"
    check "--repo" "$repo" '.+' "the git address that the workers clone from; this folder has no remote 'origin'"
    if [[ "$revision" =~ ^[0-9a-f]{40}$ ]]; then return; fi
    if ! hash="$(git -C "$root" rev-parse --quiet --verify "${revision:-HEAD}^{commit}" 2>/dev/null)"; then
        problems+=("--revision is '$revision': expected a commit, tag or branch of this clone, or a full hash")
        return
    fi
    if [ -z "$revision" ] && [ -n "$(git -C "$root" status --porcelain --untracked-files=no)" ]; then
        echo "warning: uncommitted changes stay here: the workers run commit $hash" >&2
    fi
    if [ -z "$(git -C "$root" branch --remotes --contains "$hash")" ]; then
        echo "warning: commit $hash is on no remote branch of this clone: push it, or the workers cannot check it out" >&2
    fi
    revision="$hash"
}

# What installs commit $revision of $repo on a worker, after the command $1, if there is one. Where the workers' own python is older
# than jax needs, as on Ubuntu 22.04, uv brings another.
install_line() {
    local steps="set -e"
    if [ -n "$1" ]; then steps+="; $1"; fi
    steps+="; test -d ~/blip_jax/.git || git clone --quiet $(quoted "$repo") ~/blip_jax; cd ~/blip_jax; git fetch --quiet --tags origin"
    steps+="; git checkout --quiet --detach $revision"
    steps+="; test -x .venv/bin/python || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
    steps+=" || { python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 .venv; }"
    printf '%s\n' "$steps; source launch/environment.sh; install_project tpu"
}
