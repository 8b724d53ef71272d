#!/usr/bin/env bash
# ./train.sh [flags of sear.py]   set-up on the first call, then training; with --prompts on every GPU of this machine
# ./train.sh test [flags of pytest]   set-up, then ruff and the tests
# ./train.sh ablations [flags]    all experiments, a run on each core; experiments/ablations.py --help
#
# PYTHON=/path/to/python ./train.sh   uses this interpreter if it has the packages
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

has() {  # interpreter, module ...
    "$1" -c 'import sys; from importlib.util import find_spec as find
sys.exit(any(find(name) is None for name in sys.argv[1:]))' "${@:2}" 2>/dev/null
}

python=${PYTHON:-python3}
packages=(torch numpy tiktoken regex safetensors tqdm jinja2 pytest)
if ! has "$python" "${packages[@]}"; then
    if ! has "$here/.venv/bin/python" "${packages[@]}"; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "train.sh: $python should be Python 3.10 or newer; name one with PYTHON=..." >&2; exit 2; }
        echo "train.sh: first call, installing requirements.txt into .venv" >&2
        "$python" -m venv "$here/.venv"
        "$here/.venv/bin/pip" install --quiet -r "$here/requirements.txt"
    fi
    python=$here/.venv/bin/python
fi

export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}  # threads that wait soon leave the core to others

# One worker for each GPU, or one on the CPU; sear.py is asked which if there are several GPUs. Signals go to the
# workers, which finish their step and save. The exit code is that of the first worker that fails; the others then
# get ten seconds to end by themselves.
train() {
    local world port rank code=0 status workers=()
    world=$(PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$python" -c 'import sys, torch
found = torch.cuda.device_count()
if found > 1:
    import sear
    found = found if sear.parse(sys.argv[1:]).device != "cpu" else 1
print(max(1, found))' "$@" 2>/dev/null | tail -n 1) || true
    [[ $world =~ ^[0-9]+$ ]] || world=1  # --help, or flags that the worker refuses
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    set -m  # process groups of their own: Ctrl-C reaches this script only
    for ((rank = 0; rank < world; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$world MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            "$python" "$here/sear.py" "$@" &
        workers+=($!)
    done
    set +m
    trap 'kill -TERM "${workers[@]}" 2>/dev/null || true' TERM
    trap 'kill -INT "${workers[@]}" 2>/dev/null || true' INT
    local worker limit running=1
    while [ "$running" = 1 ]; do
        sleep 0.2
        running=0
        for worker in "${workers[@]}"; do
            if kill -0 "$worker" 2>/dev/null; then
                running=1
                if [ "$code" != 0 ] && [ "$SECONDS" -gt "$limit" ]; then kill -KILL "$worker" || true; fi
                continue
            fi
            wait "$worker" && status=0 || status=$?
            if [ "$status" != 0 ] && [ "$code" = 0 ]; then
                code=$status limit=$((SECONDS + 10))
            fi
        done
    done
    trap - TERM INT
    return "$code"
}

case "${1:-}" in
test)
    shift
    has "$python" ruff xdist || "$python" -m pip install --quiet -r "$here/requirements-dev.txt"
    cd "$here" && "$python" -m ruff check --quiet . || exit
    # A process for each core, at most four; a file's tests share their fixtures, so they stay together.
    export OMP_NUM_THREADS=1
    "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@" && exit || code=$?
    [ "$code" = 1 ] || exit "$code"
    echo "train.sh: what failed runs again by itself, since ranks that start beside other tests can time out" >&2
    exec "$python" -m pytest -q --last-failed --last-failed-no-failures none "$@"
    ;;
ablations)
    shift
    PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m experiments.ablations "$@"
    ;;
*)
    train "$@"
    ;;
esac
