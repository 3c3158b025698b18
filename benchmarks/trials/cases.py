"""The command lines that benchmarks/same_results.py runs in two trees, and the corpus they read.

A case is a name and its steps, separated by `;`. A step is a script of the project and its flags;
`TERM` or `KILL` before it sends that signal as soon as there is a checkpoint_resume.pt, and
`COPY FROM TO` copies a directory. Words in capitals stand for other words (`WORDS`) or directories:
OUT is that of the case, BASE and HERE are those that the two trees write to. A case that reads
`out/NAME` needs the case NAME.
"""

import shutil
from pathlib import Path

import numpy as np
import soundfile

CPU = "--n_process_loader 2 --threads 1 --device cpu"
TINY = (
    "--hiddenEncoder 8 --hiddenGar 8 --rnnMode linear --negativeSamplingExt 4 --nPredicts 2 "
    "--sizeWindow 3200 --batchSizeGPU 4 --save_step 1 --random_seed 7"
)
LISTS = "--pathTrain corpus/train.txt --pathVal corpus/test.txt"
PHONES = "--path_phone_data corpus/labels.txt"
CAPTURED = "--pathCaptureDS corpus/all.txt"
PROBE = "eval/linear_separability.py corpus/audio corpus/train.txt corpus/test.txt"
SPEECH = "--file_extension .flac --device cpu"
WORDS = {
    "RUN": f"train.py --pathDB corpus/audio {LISTS} --pathCheckpoint OUT --nEpoch 2 {TINY} {CPU}",
    "RESUME": f"train.py --pathCheckpoint OUT --nEpoch 3 {CPU}",
    "ALIGN": "--CPCCTC --CPCCTCNumMatched 5 --CPCCTCSelfLoop --CPCCTCSkipBeg 1 --CPCCTCSkipEnd 1",
    "PHONES": PHONES,
    "PROBES": f"{PHONES} --linsep_n_epoch 2 --linsep_logs_dir OUT/probes --linsep_lr 0.01 "
    "--linsep_checkpoint_dir OUT/classifiers",
    "ASIDE": f"--supervised_classif_metric --speaker_sep --linsep_classif_each_epochs 1 "
    f"{CAPTURED} --captureEachEpochs 1 --pathCaptureSave OUT/captures --captureEverything",
    "ONLYCAPTURE": f"train.py --onlyCapture --pathDB corpus/audio {CAPTURED} {CPU}",
    "ONLYPROBE": f"train.py --only_classif_metric {CPU}",
    "PROBE": PROBE,
    "BRIEF": "--n_epoch 2 --lr 0.01 --n_process_loader 2 --device cpu --pathCheckpoint OUT",
    "FEATURES": "eval/build_zeroSpeech_features.py corpus/audio OUT/features",
    "ABX": f"eval/ABX.py from_checkpoint out/cpc out/item/phones.item corpus/audio {SPEECH}",
    "SPEECH": SPEECH,
    "RECOGNISE": "eval/common_voices_eval.py train corpus/audio corpus/phones.txt out/cpc -o OUT "
    f"--n_process_loader 2 --batchSize 4 --nEpochs 2 --lr 0.01 {SPEECH}",
}

TRAINING = {
    "cpc": "RUN",
    "packs": "RUN --samplingType uniform --max_size_loaded 60000 --logging_step 3 --nEpoch 3",
    "sequential": "RUN --samplingType sequential --arMode GRU --nLevelsGRU 2 "
    "--max_size_loaded 60000",
    "samesequence": "RUN --samplingType samesequence --normMode batchNorm --arMode RNN",
    "whole-corpus": f"train.py --pathDB corpus/audio --debug --pathCheckpoint OUT --nEpoch 1 "
    f"{TINY} {CPU}",
    "damaged-file": "RUN --pathDB corpus/damaged --max_bad_files 0.2",
    "transformers": "RUN --rnnMode transformer --arMode transformer --dropout",
    "abspos": "RUN --rnnMode ffd --arMode transformer --abspos --normMode ID",
    "no-ar": "RUN --rnnMode LSTM --arMode no_ar --normMode instanceNorm",
    "heads-rnn": "RUN --rnnMode RNN --encoder_type mfcc",
    "heads-conv4": "RUN --rnnMode conv4 --encoder_type lfb --dropout",
    "heads-conv8": "RUN --rnnMode conv8",
    "heads-conv12": "RUN --rnnMode conv12",
    "speaker": "RUN --speakerEmbedding 4 --limitNegsInBatch 2",
    "reverse": "RUN --cpc_mode reverse --arMode GRU",
    "no-loss": "RUN --cpc_mode none",
    "schedules": "RUN --schedulerRamp 2 --schedulerStep 2 --clip_grad_norm 0.01 --keep 1 "
    "--nEpoch 4 --beta1 0.8 --beta2 0.9 --epsilon 1e-6 --learningRate 0.01",
    "cpcctc": "RUN ALIGN --max_size_loaded 60000",
    "cpcctc-blank": "RUN ALIGN --CPCCTCLearnBlank --CPCCTCNoNegsMatchWin --limitNegsInBatch 2",
    "cpcctc-masq": "RUN --CPCCTC --CPCCTCNumMatched 6 --CPCCTCMasq 0:2:1:none --CPCCTCLossTemp 2",
    "cpcctc-norms": "RUN ALIGN --CPCCTCNormalizeEncs --CPCCTCNormalizePreds --speakerEmbedding 4",
    "cpcctc-heads": "RUN ALIGN --rnnMode transformer --dropout --samplingType sequential",
    "cpcctc-reverse": "RUN ALIGN --rnnMode conv4 --cpc_mode reverse",
    "phones": "RUN PHONES --supervised",
    "phones-encoder": "RUN PHONES --supervised --onEncoder --nLevelsPhone 2",
    "phones-ctc": "RUN PHONES --supervised --CTC",
    "speakers": "RUN --supervised",
    "two": "RUN --nGPU 2",
    "two-cpcctc": "RUN ALIGN PROBES ASIDE --nGPU 2 --max_size_loaded 60000",
}
RESUMED = {
    "resumed": "RUN --schedulerStep 1 --nEpoch 1 ; RESUME",
    "resumed-cpcctc": "RUN ALIGN --samplingType sequential --dropout --nEpoch 1 ; RESUME",
    "resumed-two": "RUN --nGPU 2 --nEpoch 1 ; RESUME --nGPU 2",
    "resumed-aside": "RUN ALIGN PROBES ASIDE --nEpoch 1 ; RESUME --learningRate 0.001",
    "terminated": "TERM RUN --batchSizeGPU 1 --resume_every 1 ; RUN --batchSizeGPU 1",
    "killed": "KILL RUN ALIGN --batchSizeGPU 1 --resume_every 1 ; RESUME --nEpoch 2",
    "restarted": "RUN --nEpoch 1 ; RUN --restart --random_seed 8",
    "load": "RUN --load out/cpc --loadCriterion --random_seed 8",
    "load-several": "RUN --load out/cpc out/reverse/checkpoint_0.pt ; RESUME",
    "load-level": "RUN --load out/sequential --gru_level 1",
    "load-nullspace": "RUN --load out/probe-nullspace --nullspace",
}
USES = {
    "aside": "RUN ALIGN PROBES ASIDE",
    "capture": "COPY out/cpcctc OUT ; ONLYCAPTURE PHONES --pathCheckpoint OUT --captureEverything "
    "--pathCaptureSave OUT/captures --captureDStotNr 4 ; utils/report/plot_capture.py "
    "OUT/captures/1 --windows 0 3 ; utils/report/summary.py OUT",
    "capture-some": "ONLYCAPTURE --pathCheckpoint out/cpc/checkpoint_0.pt --captureDSfreq 50 "
    "--captureConvRepr --capturePred --captureSpeakerAlign --pathCaptureSave OUT",
    "stats": "RUN ALIGN PHONES --pathCaptureDS corpus/all.txt --captureEachEpochs 1 "
    "--captureSetStats reprDiff:cosine,ctx_repr,0.05,OUT/a_boundaries:euclid,conv_repr,OUT/b"
    "_alignOccupancy:OUT/c_phoneSim:ctx_repr,OUT/d",
    "probes-ctc": "COPY out/cpc OUT ; ONLYPROBE PROBES --pathCheckpoint OUT "
    "--supervised_classif_metric --CTCphones --speaker_sep",
    "probes-encoder": "COPY out/cpc OUT ; ONLYPROBE PROBES --pathCheckpoint OUT "
    "--supervised_classif_metric --phone_get_encoded --linsep_net_layers 2",
    "probe-phones": "PROBE out/cpc BRIEF --pathPhone corpus/labels.txt --save_step 1",
    "probe-speakers": "PROBE out/cpc out/reverse BRIEF --unfrozen",
    "probe-ctc": "PROBE out/cpc BRIEF --pathPhone corpus/labels.txt --CTC --no_pretraining",
    "probe-push": "PROBE out/cpc BRIEF --pathPhone corpus/labels.txt --get_encoded "
    "--centerpushFile corpus/centers.npy --centerpushDeg 0.5",
    "probe-factorised": "PROBE out/cpc BRIEF --mode speakers_factorized --dim_inter 5",
    "probe-nullspace": "PROBE out/cpc BRIEF --pathPhone corpus/labels.txt "
    "--mode phonemes_nullspace --path_speakers_factorized out/probe-factorised/checkpoint_1.pt",
    "item": "utils/corpus/make_abx_item.py corpus/labels.txt corpus/symbols.txt OUT/phones.item "
    "--extent phone",
    "abx": "ABX --seq_norm --strict --out OUT --context any --mode all",
    "abx-draws": "ABX --get_encoded --out OUT --context any --distance_mode euclidean --seed 3 "
    "--slicing centres --max_size_group 2 --max_x_across 1",
    "features": "FEATURES out/cpc SPEECH --format npy --seqNorm --strict --maxSizeSeq 16000 ; "
    "eval/ABX.py from_pre_computed OUT/features out/item/phones.item --file_extension .npy "
    "--device cpu --context any --out OUT",
    "features-text": "FEATURES out/reverse SPEECH --getEncoded --format fea",
    "features-centers": "FEATURES out/cpc SPEECH --clusters corpus/centers.npy --format npz",
    "features-phones": "FEATURES out/phones SPEECH --addCriterion --oneHot --format pt",
    "recognise": "RECOGNISE --pathVal corpus/test.txt --seqNorm --freeze ; "
    "eval/common_voices_eval.py per OUT --device cpu --n_process_loader 2",
    "recognise-lstm": "RECOGNISE --LSTM --dropout --kernelSize 4 --loss_reduction sum",
    "demo": "utils/corpus/make_demo.py OUT --speakers 2 --utterances 5",
    "split": "utils/corpus/make_split.py corpus/audio OUT --validation 0.3 --seed 3",
    "split-speakers": "utils/corpus/make_split.py corpus/audio OUT --by speaker --validation 0.3",
    "alignments": "utils/corpus/convert_alignments.py corpus/alignments.ctm OUT --strip_stress",
    "sample-rate": "utils/corpus/adjust_sample_rate.py corpus/other_rate OUT --file_extension .wav "
    "--out_extension .flac",
}
ACROSS = {  # what one tree began, the other resumes, and as well as the one that began
    **{
        f"{tree.lower()}s-{name}": f"COPY {tree}/out/{name} OUT ; RESUME --nEpoch 4 {flags}"
        for tree in ("BASE", "HERE")
        for name, flags in (("packs", ""), ("cpcctc", ""), ("two", "--nGPU 2"))
    },
    "bases-resume": "COPY BASE/out/killed OUT ; RESUME",
    "bases-aside": "COPY BASE/out/aside OUT ; RESUME PROBES ASIDE",  # into other directories
}
REFUSED = {
    "no-such-flag": "RUN --noSuchFlag 3",
    "no-such-choice": "RUN --arMode conv",
    "no-corpus": "RUN --pathDB corpus/nowhere",
    "no-list": "RUN --pathTrain corpus/nowhere.txt",
    "no-labels": "RUN --supervised_classif_metric",
    "bad-labels": "RUN --supervised --path_phone_data corpus/train.txt",
    "bad-window": "RUN --sizeWindow 3201",
    "bad-epochs": "RUN --nEpoch -1",
    "bad-matched": "RUN --CPCCTC --CPCCTCNumMatched 1",
    "bad-masq": "RUN ALIGN --CPCCTCMasq 0:4:2",
    "bad-stat": "RUN --pathCaptureDS corpus/all.txt --captureSetStats mean:OUT",
    "not-cpcctc": "RUN --pathCaptureDS corpus/all.txt --pathCaptureSave OUT --captureCPCCTCalign",
    "not-loaded": "RUN --loadCriterion",
    "torn-load": "RUN --load corpus/torn.pt",
    "nothing-to-capture": "ONLYCAPTURE --pathCheckpoint OUT --captureEverything",
    "too-many-bad": "RUN --pathDB corpus/damaged --max_bad_files 0",
    "not-finite": "RUN --learningRate 1e30",
    "no-number": "RUN --hiddenGar x",
    "no-item": "eval/ABX.py from_checkpoint out/cpc corpus/nowhere.item corpus/audio SPEECH",
    "no-probe-load": "PROBE corpus/nowhere.pt BRIEF",
    "no-features": "FEATURES out/cpc SPEECH --train_mode",
    "not-recognised": "eval/common_voices_eval.py per OUT --device cpu",
    "split-again": "COPY out/split OUT ; utils/corpus/make_split.py corpus/audio OUT --by speaker",
}
CASES = TRAINING | USES | RESUMED | ACROSS | REFUSED


def write_corpus(root, *, speakers=3, utterances=3, seconds=2.0, seed=0):
    """Write tones in noise in LibriSpeech layout, their labels and whatever else the cases read."""
    rng = np.random.default_rng(seed)
    names, labels, phones, ctm = [], [], [], []
    for speaker in range(speakers):
        for utterance in range(utterances):
            runs = rng.integers(1, 6, int(rng.uniform(0.7, 1.3) * seconds * 100) // 8)
            tone = np.cumsum(np.repeat(200 + 300 * runs + 20 * speaker, 8 * 160)) / 16000
            wave = 0.3 * np.sin(2 * np.pi * tone) + 0.05 * rng.standard_normal(len(tone))
            names.append(f"{10 + speaker}-{speaker}-{utterance:04d}")
            path = root / "audio" / str(10 + speaker) / str(speaker) / f"{names[-1]}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave, 16000, subtype="PCM_16")
            labels.append(f"{names[-1]} {' '.join(map(str, np.repeat(runs, 8)))}")
            phones.append(f"{names[-1]} {' '.join(map(str, runs))}")
            ctm += [f"{names[-1]} 1 {0.08 * i:.2f} 0.08 P{p}1" for i, p in enumerate(runs)]
    last = f"{utterances - 1:04d}"
    for file, lines in {
        "all.txt": names,
        "train.txt": [name for name in names if not name.endswith(last)],
        "test.txt": [name for name in names if name.endswith(last)],
        "labels.txt": labels,
        "phones.txt": phones,
        "symbols.txt": ["0 SIL", *(f"{p} P{p}" for p in range(1, 6))],
        "alignments.ctm": ctm,
        "torn.pt": ["PK no checkpoint"],
    }.items():
        Path(root, file).write_text("".join(f"{line}\n" for line in lines))
    np.save(root / "centers.npy", rng.standard_normal((5, 8)).astype(np.float32))
    shutil.copytree(root / "audio", root / "damaged")
    (root / "damaged" / "10" / "0" / f"{names[0]}.flac").write_bytes(b"fLaC and no more")
    (root / "other_rate").mkdir()
    soundfile.write(root / "other_rate" / "noise.wav", rng.uniform(-0.5, 0.5, 22050), 22050)
