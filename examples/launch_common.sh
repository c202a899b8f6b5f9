# What pretrain_common.sh and finetune_common.sh share: processes, layout, torchrun. Sourced from the repository root.
#
#   NNODES=1 NODE_RANK=0 MASTER_ADDR MASTER_PORT=29500     the same on every node but for NODE_RANK
#   GPUS_PER_NODE               processes per node (NPROC is the same); unset: the GPUs found, or 1
#   TP=1 PP=1                   tensor- and pipeline-parallel size
#   MAX_RESTARTS=0              how often torchrun starts all processes again when one fails; they go on from the last checkpoint
#   WAIT_MINUTES=10             how long nodes wait for one another: for torchrun, or for a sign that node 0 prepares data
#   PREPARE=first               node 0 prepares data for all; every: each node does, for disks of their own
#   PREFLIGHT=1                 looks at data, checkpoint, disk, GPUs and network first (vlmoe check), and stops at an error

die() { echo "error: $*" >&2; exit 2; }

# whole VARIABLE LEAST: an error if it is no such number. Arithmetic and `[` would complain and go on, with one process.
whole() {
    [[ "${!1}" =~ ^(0|[1-9][0-9]{0,6})$ ]] && [ "${!1}" -ge "$2" ] || die "$1=${!1}: expected a whole number from $2 on"
}

# given OPTION ARGUMENTS...: whether OPTION is among the arguments.
given() {
    local option="$1" argument; shift
    for argument in "$@"; do
        case "$argument" in "$option" | "$option="*) return 0 ;; esac
    done
    return 1
}

# take OPTION VARIABLE ARGUMENTS...: adds OPTION with the words of VARIABLE; an error if VARIABLE is unset.
take() {
    local option="$1" variable="$2"; shift 2
    given "$option" "$@" && return
    [ -n "${!variable+set}" ] || die "$variable is not set: give the value of $option (see the head of ${COMMON:-examples/pretrain_common.sh})"
    [ -n "${!variable}" ] || return 0
    local words; read -r -d '' -a words <<< "${!variable}" || true # also over several lines
    OPTIONS+=("$option" "${words[@]}")
}

# take_if_set: the same, but an unset variable adds nothing.
take_if_set() {
    [ -z "${!2:-}" ] || take "$@"
}

# prepare_once OUTPUT FILE COMMAND...: runs a command that makes OUTPUT and FILE last of all, unless FILE is there. Node 0
# does so for all, and touches OUTPUT.running meanwhile; the others wait as long as they see that.
prepare_once() {
    local output="$1" file="$2" beat="" status=0; shift 2
    [ ! -e "$file" ] || return 0
    case "$PREPARE" in first | every) ;; *) die "PREPARE=$PREPARE is neither first nor every" ;; esac
    if [ "$NODE_RANK" != 0 ] && [ "$PREPARE" = first ]; then await "$output" "$file"; return; fi
    mkdir -p "$(dirname "$output")"
    if [ "$NNODES" -gt 1 ]; then
        (while kill -0 $$; do touch "$output.running"; sleep 5; done) >/dev/null 2>&1 </dev/null &
        beat=$!
    fi
    "$@" || status=$?
    [ -z "$beat" ] || { kill "$beat" && wait "$beat"; rm -f "$output.running"; } 2>/dev/null || true
    [ "$status" = 0 ] || exit "$status"
}

# await OUTPUT FILE: until FILE is there. Clocks of nodes differ: what counts is that the time of OUTPUT.running changes.
await() {
    local output="$1" file="$2" sign="" last="" since=$SECONDS
    echo "[launch] node $NODE_RANK waits for $file, which node 0 makes" >&2
    until ls "$(dirname "$output")" >/dev/null 2>&1 && [ -e "$file" ]; do # ls: for NFS to look again
        sign="$(stat -c %y "$output.running" 2>/dev/null || true)"
        [ "$sign" = "$last" ] || last="$sign" since=$SECONDS
        [ $((SECONDS - since)) -lt $((60 * WAIT_MINUTES)) ] || die "$file is not there, and node 0" \
            "has given no sign of making it for $WAIT_MINUTES minutes (WAIT_MINUTES); where nodes have disks of their own, set PREPARE=every"
        sleep 2
    done
}

gcd() { local a="$1" b="$2" rest; while [ "$b" -gt 0 ]; do rest=$((a % b)); a="$b"; b="$rest"; done; echo "$a"; }

count_gpus() { if command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi; }

# forward SIGNAL: to the workers themselves; torchrun would kill them 30 seconds after SIGTERM and die of SIGUSR1. Before it
# has started any there is nothing to save, and it takes no notice of a gentler signal.
forward() {
    if [ -z "$TORCHRUN_PID" ]; then EARLY="$1"; return; fi
    if pkill "-$1" -P "$TORCHRUN_PID"; then
        ASKED=1
        echo "[launch] $1: asking the workers to save and leave" >&2
    elif [ -z "${ASKED:-}" ] && kill -KILL "$TORCHRUN_PID" 2>/dev/null; then
        echo "[launch] $1: leaving, no worker has started" >&2
    fi
}

# Signals reach this shell only, its process group or every process (Slurm's proctrack/cgroup): all must work. So torchrun
# ignores them, and ends with its workers; these take no notice of what it ignores. torchrun ends a failed run with pages
# of its own: the first line with `error:` is repeated below them.
launch() {
    local status=0 errors output copier
    errors="$(mktemp)"
    # Not a child of torchrun, whose children get the signals.
    exec {output}> >(trap '' USR1 TERM INT HUP
        tee >(grep --line-buffered '^error: ' > "$errors") >&2; wait "$!") # for grep
    copier=$!
    # Before torchrun is there, so that none is left without the script that a signal ended.
    TORCHRUN_PID="" EARLY=""
    trap 'forward USR1' USR1
    trap 'forward TERM' TERM INT
    (trap '' USR1 TERM INT; exec torchrun --signals-to-handle SIGHUP,SIGQUIT "$@" 2>&"$output" {output}>&-) &
    TORCHRUN_PID=$!
    exec {output}>&-
    [ -z "$EARLY" ] || forward "$EARLY"
    # A signal ends a wait early, and torchrun may have ended before the first one; its status stays known.
    while kill -0 "$TORCHRUN_PID" 2>/dev/null; do
        wait "$TORCHRUN_PID" || true
    done
    wait "$TORCHRUN_PID" || status=$?
    # A process that outlives torchrun may hold its output open.
    for _ in {1..50}; do kill -0 "$copier" 2>/dev/null || break; sleep 0.1; done
    [ "$status" -eq 0 ] || head -n 1 "$errors" >&2
    rm -f "$errors"
    return "$status"
}

[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x .venv/bin/torchrun ] || export PATH="$PWD/.venv/bin:$PATH"
command -v torchrun >/dev/null || die "no torchrun: install first (bash examples/setup_env.sh)"

NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" MASTER_PORT="${MASTER_PORT:-29500}"
WAIT_MINUTES="${WAIT_MINUTES:-10}" PREPARE="${PREPARE:-first}"
GPUS_PER_NODE="${GPUS_PER_NODE:-${NPROC:-$(count_gpus)}}"
TP="${TP:-1}" PP="${PP:-1}" MAX_RESTARTS="${MAX_RESTARTS:-0}"
for NUMBER in "NNODES 1" "NODE_RANK 0" "MASTER_PORT 1" "WAIT_MINUTES 0" "GPUS_PER_NODE 0" "TP 1" "PP 1" "MAX_RESTARTS 0"; do
    whole ${NUMBER}
done
[ "$GPUS_PER_NODE" -gt 0 ] || GPUS_PER_NODE=1
RANKS=$((NNODES * GPUS_PER_NODE))
[ $((RANKS % (TP * PP))) -eq 0 ] || die "NNODES=$NNODES x GPUS_PER_NODE=$GPUS_PER_NODE ranks cannot hold TP=$TP x PP=$PP"

# start_workers PROGRAM ARGUMENTS...: torchrun on this node.
start_workers() {
    local launcher=(--standalone)
    if given --help "$@" || given -h "$@"; then exec python -m megatron_vlmoe "$@"; fi
    if [ "$NNODES" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$NNODES, but MASTER_ADDR (the host name of node 0) is not set"
        [ "$NODE_RANK" -lt "$NNODES" ] || die "NODE_RANK=$NODE_RANK is not below NNODES=$NNODES"
        launcher=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
            --rdzv-conf "timeout=$((60 * WAIT_MINUTES))")
    fi
    # In a second, with one line, and once: torchrun would have every worker find the same.
    RANK=0 WORLD_SIZE="$RANKS" python -m megatron_vlmoe check-options "$@" || return
    # Threads of a process for what runs on the CPU; the machine's cores are shared by its processes.
    local threads=$(($(nproc) / GPUS_PER_NODE))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    # megatron-core overlaps tensor-parallel communication with computation only on one hardware queue, which keeps other
    # transfers from running beside kernels.
    local tensor="$TP" previous="" argument
    for argument in "$@"; do
        case "$previous=$argument" in
            --parallel.tensor_model_parallel_size=* | *=--parallel.tensor_model_parallel_size=*) tensor="${argument#*=}" ;;
        esac
        previous="$argument"
    done
    [ "$tensor" = 1 ] || export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Else processes that are started again would meet in the store of those before them, and may wait for these for ever.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
    launcher+=(--nproc-per-node "$GPUS_PER_NODE")
    if [ -n "${PREFLIGHT:-}" ]; then
        launch "${launcher[@]}" -m megatron_vlmoe check "$@" || return
    fi
    launch "${launcher[@]}" --max-restarts "$MAX_RESTARTS" -m megatron_vlmoe "$@"
}
