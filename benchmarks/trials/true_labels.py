"""Checks that audio, phones and speakers in training are those of the files, read independently.

Both functions take the command line of a run that succeeded and raise AssertionError otherwise.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import soundfile

from dataset import BatchLoader, build_sets, set_options
from utils.capture import CaptureReader
from utils.data.corpus import open_corpus, split_corpus
from utils.data.labels import read_phone_labels
from utils.data.listing import LISTING
from utils.run.flags import parse_arguments


def check_training_sets(words):
    """Windows of the training and the validation set, each within one file."""
    args = parse_arguments(words)[0]
    truth, corpus = Truth(args), open_corpus(args)
    labels = read_phone_labels(args.path_phone_data) if args.path_phone_data else None
    split = split_corpus(args, corpus)
    for audio in build_sets(corpus, split, labels=labels, **set_options(args)):
        loader = BatchLoader(audio, args.batchSizeGPU, "samesequence", seed=0, training=True)
        for _, batch in loader.epoch(0):
            batch = batch.to("cpu")
            for i, window in enumerate(batch.window):
                path, offset = loader.locate(window)
                truth.check_waveform(path, offset, batch.waveform[i, 0].numpy())
                truth.check_phones(path, offset, batch.phone[i].numpy())
                truth.check_speaker(path, batch.speaker[i])


def check_capture(words):
    """Phones and speakers as the last epoch captured them."""
    args = parse_arguments(words)[0]
    truth = Truth(args)
    reader = CaptureReader(Path(args.pathCaptureSave, str(args.nEpoch - 1)))
    for number in range(reader.n_windows):
        window = reader.window(number)
        truth.check_speaker(window.file, window.tensors["speaker_align"])
        if "phone_align" in window.tensors:
            truth.check_phones(window.file, window.offset, window.tensors["phone_align"].numpy())


class Truth:
    """Phones and speakers of the files, read in the simplest way."""

    def __init__(self, args):
        self.root, self.labels = Path(args.pathDB), read_labels(args.path_phone_data)
        folders = (Path(path).parts[:-1] for path in listed_files(args))
        self.speakers = sorted({folder[0] if folder else "" for folder in folders})

    def check_waveform(self, path, offset, waveform):
        audio, rate = soundfile.read(os.fsencode(self.root / path), dtype="float32", always_2d=True)
        assert rate == 16_000, f"{path}: rate"
        part = audio[offset : offset + len(waveform)].mean(axis=1)
        assert np.allclose(part, waveform, rtol=0, atol=1e-6), f"{path}: wrong audio"

    def check_phones(self, path, offset, phones):
        """Check phones up to the end of the file: beyond it, they belong to the next one."""
        name = Path(path).name.removesuffix(".flac")
        end = soundfile.info(os.fsencode(self.root / path)).frames // 160
        labels = self.labels.get(name, [-1] * end)[:end][offset // 160 :][: len(phones)]
        assert labels, f"{path}: no labels there"
        assert offset % 160 == 0, f"{path}: not at a label's beginning"
        assert labels == phones[: len(labels)].tolist(), f"{path}: wrong phones"

    def check_speaker(self, path, speaker):
        folder = Path(path).parts[0] if len(Path(path).parts) > 1 else ""
        assert self.speakers[int(speaker)] == folder, f"{path}: wrong speaker"


def listed_files(args):
    """Paths of the corpus: those that were listed once, or those that are there."""
    listing = Path(args.pathDB, LISTING)
    if listing.is_file():
        return json.loads(listing.read_text())["extensions"][args.file_extension]["path"]
    paths = Path(args.pathDB).rglob("*" + args.file_extension)
    return [path.relative_to(args.pathDB) for path in paths if not path.is_dir()]


def read_labels(path):
    """Name -> list of labels."""
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [line.split() for line in re.split(r"\r\n|\r|\n", text)]
    return {words[0]: list(map(int, words[1:])) for words in lines if words}
