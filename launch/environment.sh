# Sourced by the other scripts: makes .venv beside the project's files and installs the project into it, once per version
# of setup.py. `install_project test` adds the extra "test"; what follows are further requirements of pip. Leaves $python, the
# interpreter to use; needs `set -o pipefail` around it. `run_tests` runs pytest: two processes share the work, file by file,
# the longest first. `another_environment PYTHON` before both makes them use .venv-3.13, or whatever version PYTHON is of.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
base=""

another_environment() {
    base="$1"
    venv="$root/.venv-$(version_of "$base")"
    python="$venv/bin/python"
}

# 3.11 of "Python 3.11.7"
version_of() {
    local said
    said="$("$1" --version)"
    said="${said#Python }"
    echo "${said%.*}"
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer on PATH: install one, then run this again" >&2
    return 1
}

# The newest that setup.py names, on PATH or of pyenv; nothing where there is none that can make an environment.
newest_python() {
    local version candidate
    for version in 3.13 3.12 3.11; do
        for candidate in "python$version" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python; do
            if "$candidate" -c "import ensurepip, venv" 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
}

install_project() {
    local extra="$1" stamp wanted
    shift
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="${base:-$(find_python)}"
        echo "== making $venv with $("$base" --version)"
        "$base" -m venv --clear "$venv" || {
            echo "error: $base cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2
            return 1
        }
    fi
    stamp="$venv/installed${extra:+-$extra}"
    wanted="$(cksum < "$root/setup.py") $root $*"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "== using $venv (setup.py has not changed since the install)"
        return
    fi
    echo "== installing the project${extra:+ with [$extra]} and its dependencies into $venv (about 1 GB, some minutes)"
    (cd "$root" && "$python" -m pip install --progress-bar off --disable-pip-version-check -e ".${extra:+[$extra]}" "$@") |
        told_from_time_to_time
    echo "$wanted" > "$stamp"
    echo "== installed; for a shell of yours with the blip-jax command: source $venv/bin/activate"
}

# Of pip's many lines one each five seconds, and the one after which it is silent for longest.
told_from_time_to_time() {
    local line begun="$SECONDS" next=0
    while IFS= read -r line; do
        if [ "$((SECONDS - begun))" -ge "$next" ] || [[ "$line" == "Installing collected packages"* ]]; then
            echo "   $((SECONDS - begun)) s: ${line:0:100}"
            next="$((SECONDS - begun + 5))"
        fi
    done
}

run_tests() {
    cd "$root" || exit
    local command=(pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder "$@")
    echo "== ${command[*]}"
    "$python" -m "${command[@]}"
}
