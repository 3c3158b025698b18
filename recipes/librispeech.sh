#!/usr/bin/env bash
# LibriSpeech or Libri-Light: training, probes for phones and speakers, ABX, units (README.md).
#   LIBRISPEECH=/data/LibriSpeech ALIGNMENTS=/data/alignments bash recipes/librispeech.sh
#   SMALL=1 bash recipes/librispeech.sh [prepare] [train] [evaluate]
set -euo pipefail

OUT=${OUT:-runs/${SMALL:+small-}librispeech}
LIBRISPEECH=${LIBRISPEECH:-LibriSpeech}  # holds train-clean-100 and dev-clean, for probes and ABX
ALIGNMENTS=${ALIGNMENTS:-alignments}     # TextGrids of these two subsets, in folders of that name
CORPUS=${CORPUS:-}                       # holds SUBSETS; empty: LIBRISPEECH
SUBSETS=${SUBSETS:-train-clean-100}      # to train on; several are separated by blanks
VALIDATION=${VALIDATION:-0.05}           # fraction of their utterances
TRAIN_LIST=${TRAIN_LIST:-}               # published lists; empty: a random split
VAL_LIST=${VAL_LIST:-}
PHONES=${PHONES:-}                       # labels of train-clean-100; empty: from its alignments
ITEMS=${ITEMS:-}                         # ABX items of dev-clean; empty: from its alignments
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "${SMALL:-}" ]; then
    LIBRISPEECH=$OUT/corpus/LibriSpeech ALIGNMENTS=$OUT/corpus/alignments
fi
CORPUS=${CORPUS:-$LIBRISPEECH}
LABELLED=$LIBRISPEECH/train-clean-100
DEV=$LIBRISPEECH/dev-clean
AUDIO=$CORPUS/$SUBSETS
[ "$SUBSETS" = "${SUBSETS/ /}" ] || AUDIO=$OUT/audio-${SUBSETS// /+}
LISTS=("${TRAIN_LIST:-$OUT/lists/train.txt}" "${VAL_LIST:-$OUT/lists/val.txt}")
PROBE_LISTS=("${LISTS[@]}")
[ "$AUDIO" = "$LABELLED" ] || PROBE_LISTS=("$OUT/probe-lists/train.txt" "$OUT/probe-lists/val.txt")

# Chapters (books) of several subsets below one folder, by speaker: a speaker may be in several.
link_subsets() {
    local subset folder speaker
    for subset in $SUBSETS; do
        for folder in "$(cd "$CORPUS/$subset" && pwd)"/*/*/; do
            folder=${folder%/} speaker=${folder%/*}
            mkdir -p "$AUDIO/${speaker##*/}"
            ln -sfn "$folder" "$AUDIO/${speaker##*/}/${folder##*/}"
        done
    done
}

prepare_part() {
    [ -z "${SMALL:-}" ] || step corpus recipes/small_corpus.py librispeech "$OUT/corpus"
    [ "$AUDIO" = "$CORPUS/$SUBSETS" ] || link_subsets
    [ -n "$TRAIN_LIST" ] ||
        step lists utils/corpus/make_split.py "$AUDIO" "$OUT/lists" --validation "$VALIDATION"
    [ "$AUDIO" = "$LABELLED" ] || step probe-lists utils/corpus/make_split.py "$LABELLED" \
        "$OUT/probe-lists" --validation 0.05
    step labels utils/corpus/convert_alignments.py "$ALIGNMENTS/train-clean-100" "$OUT/labels" \
        --strip_stress
    step dev-labels utils/corpus/convert_alignments.py "$ALIGNMENTS/dev-clean" "$OUT/dev-labels" \
        --strip_stress --phones "$OUT/labels/phones.txt"
    [ -n "$ITEMS" ] || step items utils/corpus/make_abx_item.py \
        "$OUT/dev-labels/converted_aligned_phones.txt" "$OUT/labels/phones.txt" "$OUT/dev-clean.item"
}

train_part() {
    train "$AUDIO" "${LISTS[@]}"
}

evaluate_part() {
    probe phone "$LABELLED" "${PROBE_LISTS[@]}" \
        --pathPhone "${PHONES:-$OUT/labels/converted_aligned_phones.txt}"
    probe speaker "$LABELLED" "${PROBE_LISTS[@]}"
    abx "${ITEMS:-$OUT/dev-clean.item}" "$DEV"
    units "$AUDIO" "$DEV" "$OUT/dev-labels/converted_aligned_phones.txt" -
}

run_parts "$@"
