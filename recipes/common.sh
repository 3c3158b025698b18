# What the recipes share: systems, small sizes, and steps that aren't repeated. A recipe sources it
# after its variables; OUT is where everything goes.

fail() {
    echo "error: $1" >&2
    exit 2
}

# --help: the beginning of the recipe, and the variables below.
case " $* " in
    *" -h "* | *" --help "*)
        sed -n '2,/^source/{/^set /d;/^source/d;s/^# \{0,1\}//;p;}' "$0"
        sed -n '/^[A-Z_]*=${/p' "${BASH_SOURCE[0]}"
        exit
        ;;
esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}  # where the project's packages are installed
[ -x "$PYTHON" ] || PYTHON=python
SYSTEM=${SYSTEM:-acpc}         # cpc, acpc, acpc-paper, augmented, macpc
EPOCHS=${EPOCHS:-200}
UNITS=${UNITS:-50}             # clusters
NOISE=${NOISE:-}               # folder of noise for SYSTEM=augmented; empty: babble
TRAIN_FLAGS=${TRAIN_FLAGS:-}   # more flags of train.py, such as "--precision bf16"
PROBE_FLAGS=${PROBE_FLAGS:-}   # more flags of eval/linear_separability.py

PAPER=(--CPCCTC --nPredicts 6 --CPCCTCNumMatched 12 --nLevelsGRU 2 --limitNegsInBatch 8 --dropout
    --schedulerRamp 10 --batchSizeGPU 32)
case $SYSTEM in
    cpc) SYSTEM_FLAGS=(--nPredicts 12) ;;
    acpc) SYSTEM_FLAGS=(--CPCCTC --nPredicts 8 --CPCCTCNumMatched 12 --CPCCTCSelfLoop
        --CPCCTCSkipBeg 1 --CPCCTCSkipEnd 2) ;;
    acpc-paper) SYSTEM_FLAGS=("${PAPER[@]}") ;;
    augmented) SYSTEM_FLAGS=(--nPredicts 12 --nLevelsGRU 2 --schedulerRamp 10
        --augment_past --augment_type pitch additive reverb ${NOISE:+--pathDBNoise "$NOISE"}) ;;
    macpc) SYSTEM_FLAGS=("${PAPER[@]}" --normalizeCPCScore --multiLevel
        --segmentationMode cosineDissimilarity --nPredictsSegment 2 --CPCCTCNumMatchedSegment 4) ;;
    *) fail "SYSTEM=$SYSTEM: cpc, acpc, acpc-paper, augmented or macpc" ;;
esac

if [ -n "${SMALL:-}" ]; then
    EPOCHS=1 UNITS=16
    PROBE_FLAGS="--n_epoch 2 --lr 1e-2"
    SYSTEM_FLAGS+=(--rnnMode linear --hiddenEncoder 32 --hiddenGar 32 --negativeSamplingExt 16
        --sizeWindow 10240 --batchSizeGPU 8 --learningRate 2e-3 --random_seed 1)
    [ "$SYSTEM" != macpc ] || SYSTEM_FLAGS+=(--rnnModeSegment linear)
fi

RUN=$OUT/$SYSTEM
CHECKPOINT=$RUN/checkpoint_$((EPOCHS - 1)).pt
RESULTS=$RUN/results_$EPOCHS   # those of a run that is continued go beside those before

# step NAME SCRIPT ARGUMENT ...: run a Python script of the project, unless the same command has
# succeeded before.
step() {
    local name=$1 script=$2 words
    shift 2
    words=$(printf ' %q' "$script" "$@")
    if [ "$(cat "$OUT/steps/$name" 2>/dev/null)" = "$words" ]; then
        echo "$name: done before"
        return
    fi
    printf '\n%s: python%s\n' "$name" "$words"
    "$PYTHON" "$ROOT/$script" "$@"
    mkdir -p "$OUT/steps"
    printf '%s' "$words" >"$OUT/steps/$name"
}

# train AUDIO TRAIN_LIST VAL_LIST [FLAG ...]
train() {
    step "train-$SYSTEM" train.py --pathDB "$1" --pathTrain "$2" --pathVal "$3" \
        --pathCheckpoint "$RUN" --nEpoch "$EPOCHS" \
        "${SYSTEM_FLAGS[@]}" "${@:4}" $TRAIN_FLAGS
}

# probe TASK AUDIO TRAIN_LIST VAL_LIST [FLAG ...]
probe() {
    step "probe-$1-$SYSTEM" eval/linear_separability.py "$2" "$3" "$4" "$CHECKPOINT" \
        --pathCheckpoint "$RESULTS/$1" "${@:5}" $PROBE_FLAGS
}

# abx ITEMS AUDIO
abx() {
    step "abx-$SYSTEM" eval/ABX.py from_checkpoint "$CHECKPOINT" "$1" "$2" --seq_norm --strict \
        --out "$RESULTS/abx"
}

# units TRAIN_AUDIO AUDIO LABELS SEPARATOR: clusters of the first, units of the second
units() {
    step "cluster-$SYSTEM" eval/cluster.py "$CHECKPOINT" "$RESULTS/clusters_$UNITS" "$1" -k "$UNITS"
    step "quantize-$SYSTEM" eval/quantize.py "$RESULTS/clusters_$UNITS" "$2" "$RESULTS/units_$UNITS"
    step "units-$SYSTEM" eval/unit_quality.py "$RESULTS/units_$UNITS/quantized_outputs.txt" "$3" \
        --separator "$4"
}

# segmentation NAME AUDIO TEST_LIST TUNING_LIST LABELS [FLAG ...]
segmentation() {
    step "segmentation-$1-$SYSTEM" eval/segmentation.py "$2" "$3" "$CHECKPOINT" --pathTune "$4" \
        --pathPhone "$5" --out "$RESULTS/segmentation-$1" "${@:6}"
}

# The parts that the command line of a recipe names, or all of them.
run_parts() {
    local part
    [ $# -gt 0 ] || set -- prepare train evaluate
    for part in "$@"; do
        case $part in
            prepare | train) "${part}_part" ;;
            evaluate)
                evaluate_part
                "$PYTHON" "$ROOT/recipes/results.py" "$OUT"/*/results_"$EPOCHS"
                ;;
            *) fail "$part: prepare, train or evaluate" ;;
        esac
    done
}
