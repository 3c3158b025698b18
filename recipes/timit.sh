#!/usr/bin/env bash
# TIMIT: training on TRAIN, phone boundaries and a phone probe on TEST (README.md).
#   TIMIT=/data/TIMIT bash recipes/timit.sh
#   SMALL=1 bash recipes/timit.sh [prepare] [train] [evaluate]
set -euo pipefail

OUT=${OUT:-runs/${SMALL:+small-}timit}
TIMIT=${TIMIT:-TIMIT}                # holds TRAIN/DR1/FCJF0/SA1.WAV, SA1.PHN, ... and TEST
EXTENSION=${EXTENSION:-.WAV}         # of the audio
TEST_SPEAKERS=${TEST_SPEAKERS:-all}  # or core: the 24 speakers of the core test set, without SA
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CORE="MDAB0 MWBT0 FELC0 MTAS1 MWEW0 FPAS0 MJMP0 MLNT0 FPKT0 MLLL0 MTLS0 FJLM0 MBPM0 MKLT0 FNLP0
    MCMJ0 MJDH0 FMGD0 MGRT0 MNJM0 FDHC0 MJLN0 MPAM0 FMLD0"
[ -z "${SMALL:-}" ] || TIMIT=$OUT/corpus
LABELS=$OUT/labels/converted_aligned_phones.txt
TEST_LIST=$OUT/lists/test-$TEST_SPEAKERS.txt

# The utterances below a folder of TIMIT, as TRAIN/DR1/FCJF0/SA1.
names() {
    (cd "$TIMIT" && find "$1" -name "*$EXTENSION") | sed "s/\\$EXTENSION\$//" | sort
}

prepare_part() {
    [ -z "${SMALL:-}" ] || step corpus recipes/small_corpus.py timit "$OUT/corpus"
    mkdir -p "$OUT/lists"
    names TRAIN >"$OUT/lists/all-train.txt"
    case $TEST_SPEAKERS in
        all) names TEST >"$TEST_LIST" ;;
        core) names TEST | grep -iE "/(${CORE//[[:space:]]/|})/S[IX]" >"$TEST_LIST" ||
            fail "TIMIT=$TIMIT: has no speaker of the core test set in TEST" ;;
        *) fail "TEST_SPEAKERS=$TEST_SPEAKERS: all or core" ;;
    esac
    step lists utils/corpus/make_split.py "$TIMIT" "$OUT/lists" --list "$OUT/lists/all-train.txt" \
        --speaker_level 3 --validation 0.1 --file_extension "$EXTENSION"
    step labels utils/corpus/convert_alignments.py "$TIMIT" "$OUT/labels" --silence h#
}

train_part() {
    train "$TIMIT" "$OUT/lists/train.txt" "$OUT/lists/val.txt" --speaker_level 3 \
        --file_extension "$EXTENSION"
}

evaluate_part() {
    local lists=("$TEST_LIST" "$OUT/lists/val.txt")
    probe phone "$TIMIT" "$OUT/lists/train.txt" "$TEST_LIST" --pathPhone "$LABELS" \
        --speaker_level 3 --file_extension "$EXTENSION"
    segmentation contexts "$TIMIT" "${lists[@]}" "$LABELS" --file_extension "$EXTENSION"
    segmentation encoded "$TIMIT" "${lists[@]}" "$LABELS" --file_extension "$EXTENSION" \
        --get_encoded
    [ "$SYSTEM" != macpc ] || step segmentation-segments-macpc eval/segmentation.py "$TIMIT" \
        "$TEST_LIST" "$CHECKPOINT" --level segments --pathPhone "$LABELS" \
        --file_extension "$EXTENSION" --out "$RESULTS/segmentation-segments"
}

run_parts "$@"
