#!/usr/bin/env bash
# A small corpus of an unwritten language, as WAV with silver alignments: training, probes, ABX,
# units and boundaries (README.md).
#   CORPUS=/data/wav ALIGNMENTS=/data/textgrids bash recipes/unwritten.sh
#   SMALL=1 bash recipes/unwritten.sh [prepare] [train] [evaluate]
set -euo pipefail

OUT=${OUT:-runs/${SMALL:+small-}unwritten}
CORPUS=${CORPUS:-wav}                 # files SPEAKER_ANYTHING.wav at 16 kHz
ALIGNMENTS=${ALIGNMENTS:-alignments}  # SPEAKER_ANYTHING.TextGrid
SEPARATOR=${SEPARATOR:-_}             # ends the speaker in the name of a file
TIER=${TIER:-phones}
LOAD=${LOAD:-}                        # checkpoint to begin with, such as one of LibriSpeech
PROBE_FLAGS=${PROBE_FLAGS:---lr 1e-2 --batchSizeGPU 32}  # for a small corpus, as in the demo
AUDIO=${AUDIO:-$OUT/audio}            # where speakers have folders already: this instead of CORPUS
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -n "${SMALL:-}" ]; then
    CORPUS=$OUT/corpus/wav ALIGNMENTS=$OUT/corpus/alignments
fi
LABELS=$OUT/labels/converted_aligned_phones.txt

# All files in folders of their speakers.
link_speakers() {
    local file speaker
    for file in "$(cd "$CORPUS" && pwd)"/*.wav; do
        [ -e "$file" ] || fail "CORPUS=$CORPUS: holds no .wav files"
        speaker=${file##*/} speaker=${speaker%%"$SEPARATOR"*}
        mkdir -p "$AUDIO/$speaker"
        [ -e "$AUDIO/$speaker/${file##*/}" ] || ln -sf "$file" "$AUDIO/$speaker/"
    done
}

# Warn of audio without alignment, and the reverse.
check_pairs() {
    local single
    single=$(comm -3 <(stems "$AUDIO") <(stems "$ALIGNMENTS") | tr -d '\t')
    [ -z "$single" ] || echo "warning: names in only one of $AUDIO and $ALIGNMENTS:" \
        "$(wc -l <<<"$single")," $(head -5 <<<"$single")
}

# The names of the files below a folder, without extension and hidden files.
stems() {
    find -L "$1" -type f ! -name '[_.]*' | sed 's|.*/||; s|\.[^.]*$||' | LC_ALL=C sort -u
}

prepare_part() {
    [ -z "${SMALL:-}" ] || step corpus recipes/small_corpus.py unwritten "$OUT/corpus"
    [ "$AUDIO" != "$OUT/audio" ] || link_speakers
    check_pairs
    step lists utils/corpus/make_split.py "$AUDIO" "$OUT/lists" --validation 0.1
    step labels utils/corpus/convert_alignments.py "$ALIGNMENTS" "$OUT/labels" --tier "$TIER"
    step items utils/corpus/make_abx_item.py "$LABELS" "$OUT/labels/phones.txt" "$OUT/all.item" \
        --separator "$SEPARATOR"
}

train_part() {
    train "$AUDIO" "$OUT/lists/train.txt" "$OUT/lists/val.txt" ${LOAD:+--load "$LOAD"}
}

evaluate_part() {
    local lists=("$OUT/lists/train.txt" "$OUT/lists/val.txt")
    probe phone "$AUDIO" "${lists[@]}" --pathPhone "$LABELS"
    probe speaker "$AUDIO" "${lists[@]}"
    abx "$OUT/all.item" "$AUDIO"
    units "$AUDIO" "$AUDIO" "$LABELS" "$SEPARATOR"
    segmentation contexts "$AUDIO" "$OUT/lists/val.txt" "$OUT/lists/train.txt" "$LABELS"
}

run_parts "$@"
