#!/usr/bin/env bash
# ./train.sh [flags of sear.py]   set-up on the first call, then training on every GPU of this machine, or on the CPU
# ./train.sh test                 the same set-up, then the tests
# ./train.sh ablations [flags]    five objectives x three seeds, then the table and the pictures
#
# PYTHON=/path/to/python ./train.sh   an interpreter that has the packages already is used as it is
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

has_packages() {
    "$1" -c 'import sys; from importlib.util import find_spec as find
packages = "torch numpy tiktoken safetensors tqdm jinja2 pytest".split()
sys.exit(any(find(p) is None for p in packages))' 2>/dev/null
}

python=${PYTHON:-python3}
if ! has_packages "$python"; then
    if ! has_packages "$here/.venv/bin/python"; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "train.sh: $python is no Python 3.10 or newer; name one with PYTHON=..." >&2; exit 2; }
        echo "train.sh: first call, installing requirements.txt into .venv" >&2
        "$python" -m venv "$here/.venv"
        "$here/.venv/bin/pip" install --quiet -r "$here/requirements.txt"
    fi
    python=$here/.venv/bin/python
fi

# torchrun turns every exit code into 1 and answers a signal with a traceback. So the workers tell their exit code and
# their process id through a folder, and signals go to them alone: they finish the step, save and end by themselves.
stopped=0
train() {
    local status code=0 child processes
    status=$(mktemp -d)
    processes=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    set -m  # a process group of its own for torchrun: Ctrl-C reaches this script only
    SEAR_STATUS=$status "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" \
        "$here/sear.py" "$@" &
    child=$!
    set +m
    trap 'stopped=1; kill -TERM $(cat "$status"/*.pid) 2>/dev/null || kill -TERM "$child"' TERM
    trap 'stopped=1; kill -INT $(cat "$status"/*.pid) 2>/dev/null || kill -TERM "$child"' INT
    while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
    trap - TERM INT
    [ ! -e "$status/code" ] || code=$(cat "$status/code")
    rm -rf "$status"
    return "$code"
}

case "${1:-}" in
test)
    shift
    cd "$here" && exec "$python" -m pytest -q "$@"
    ;;
ablations)
    shift
    runs=()
    for seed in 1 2 3; do
        for objective in sear outcome safe-thought competing-outcome no-thought; do
            run=runs/ablations/$objective-seed$seed
            runs+=("$run")
            flags=(--objective "$objective" --seed "$seed" "$@")
            # the five share their seed's start model
            [ "$objective" = sear ] || flags+=(--model "runs/ablations/sear-seed$seed/start")
            if [ -e "$run/config.json" ]; then flags+=(--resume "$run"); else flags+=(--out "$run"); fi
            train "${flags[@]}"
            [ "$stopped" = 0 ] || exit 0
        done
    done
    "$python" "$here/evaluate.py" "${runs[@]}"
    ;;
*)
    train "$@"
    ;;
esac
