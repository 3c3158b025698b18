"""Tests of the building blocks: arguments, files, checkpoints, captures, logs, stop signals."""

import contextlib
import errno
import importlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from criterion.prediction import build_head
from dataset import SAMPLINGS
from eval.center_push import read_centers
from model import CPCAR, NORMS, build_encoder
from tests.helpers import GOLDEN, ROOT, assert_close, ends_refused, golden_cases
from utils.capture import CaptureReader, CaptureWriter, prediction_names, refuse_to_lose
from utils.files import (
    TEMPORARY_PREFIX,
    atomic_path,
    check_writable,
    load_array,
    load_json,
    load_tensors,
    remove_leftovers,
    save_json,
    save_tensors,
)
from utils.misc import Chance, UserError, seed_from
from utils.report.plots import draw_curves
from utils.run.adam import load_optimizer
from utils.run.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    permute_speakers,
    read_checkpoint,
    save_checkpoint,
)
from utils.run.checkpoint_checks import check_resumable
from utils.run.command import CommandLine, command
from utils.run.flags import (
    ARCHITECTURE,
    CAPTURE_GROUP,
    CONTRASTIVE_ONLY,
    CPCCTC_ONLY,
    DATA_ORDER,
    FILES,
    INHERITED,
    MODEL,
    PATHS,
    PROBE_GROUP,
    SUPERVISED_ONLY,
    THIS_CALL,
    build_parser,
    parse_arguments,
    stored_arguments,
)
from utils.run.level_flags import REFUSED
from utils.run.lock import LOCK_NAME, locked, lost_lock
from utils.run.logs import Clock, RunningMeans, append_epoch
from utils.run.resolve import inherit_args
from utils.run.rules import check_arguments, check_call, complete
from utils.run.state import learning_rate
from utils.run.stopping import Stopped, StopSignals

COMMANDS = [
    str(path.relative_to(ROOT))
    for folder in ("eval", "utils/corpus", "utils/report", "recipes")
    for path in sorted(Path(ROOT, folder).glob("*.py"))
    if "CommandLine(" in path.read_text()
]

# ------------------------------------------------------------------------------------- arguments

ORIGINAL_DEFAULTS = {  # names and defaults that command lines of the original rely on
    "hiddenEncoder": 256, "hiddenGar": 256, "nPredicts": 12, "CPCCTC": False,
    "CPCCTCNumMatched": 16, "CPCCTCSkipBeg": 0, "CPCCTCSkipEnd": 0, "CPCCTCSelfLoop": False,
    "CPCCTCLearnBlank": False, "CPCCTCNoNegsMatchWin": False, "CPCCTCMasq": "",
    "CPCCTCLossTemp": 1.0, "CPCCTCNormalizeEncs": False, "CPCCTCNormalizePreds": False,
    "limitNegsInBatch": 0, "negativeSamplingExt": 128, "learningRate": 2e-4, "schedulerStep": -1,
    "schedulerRamp": None, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "sizeWindow": 20480,
    "nEpoch": 200, "samplingType": "samespeaker", "nLevelsPhone": 1, "cpc_mode": None,
    "encoder_type": "cpc", "normMode": "layerNorm", "onEncoder": False, "random_seed": None,
    "speakerEmbedding": 0, "arMode": "LSTM", "nLevelsGRU": 1, "rnnMode": "transformer",
    "dropout": False, "abspos": False, "pathDB": None, "file_extension": ".flac",
    "pathTrain": None, "pathVal": None, "onlyCapture": False, "pathCaptureDS": None,
    "captureDSfreq": None, "captureDStotNr": None, "n_process_loader": 8, "ignore_cache": False,
    "max_size_loaded": 4_000_000_000, "gru_level": -1, "supervised": False, "CTC": False,
    "path_phone_data": None, "supervised_classif_metric": False, "speaker_sep": False,
    "CTCphones": False, "linsepBatchSizeGPU": 8, "linsep_n_epoch": 10, "phone_get_encoded": False,
    "linsep_lr": 2e-4, "linsep_beta1": 0.9, "linsep_beta2": 0.999, "linsep_epsilon": 2e-8,
    "only_classif_metric": False, "linsep_logs_dir": None, "linsep_checkpoint_dir": None,
    "linsep_task_logging_step": 1, "linsep_classif_each_epochs": 20, "linsep_net_layers": 1,
    "captureSetStats": None, "pathCheckpoint": None, "logging_step": 1000, "save_step": 5,
    "pathCaptureSave": None, "captureEachEpochs": 10, "captureConvRepr": False,
    "captureCtxRepr": False, "captureSpeakerAlign": False, "capturePhoneAlign": False,
    "captureEverything": False, "capturePred": False, "captureCPCCTCalign": False,
    "captureCPCCTClogScores": False, "load": None, "loadCriterion": False, "restart": False,
    "nullspace": False, "nGPU": -1, "batchSizeGPU": 8, "debug": False,
}  # fmt: skip


def test_flags_of_the_original_keep_their_names_and_defaults():
    defaults = vars(build_parser().parse_args([]))
    assert {name: defaults[name] for name in ORIGINAL_DEFAULTS} == ORIGINAL_DEFAULTS


def test_an_extension_needs_no_dot():
    endings = {"flac": ".flac", ".wav": ".wav", "_a.wav": "_a.wav", "": ""}
    for given, meant in endings.items():
        assert build_parser().parse_args(["--file_extension", given]).file_extension == meant


def test_every_flag_is_in_exactly_one_class():
    classes = [ARCHITECTURE, DATA_ORDER, INHERITED, THIS_CALL]
    flags = vars(build_parser().parse_args([]))
    assert sum(map(len, classes)) == len(flags)
    assert frozenset().union(*classes) == flags.keys()


def test_sets_of_flags_follow_from_the_declarations():
    assert ARCHITECTURE >= MODEL == {
        "hiddenEncoder", "hiddenGar", "encoder_type", "normMode", "arMode", "nLevelsGRU", "abspos",
        "cpc_mode", "sizeWindow", "initialisation", "linearOutput", "multiLevel",
        "segmentationMode", "segmentProminence", "segmentOnContext", "noSegmentation",
        "hiddenEncoderSegment", "hiddenGarSegment", "nLayersBoundaryPredictor",
    }  # fmt: skip
    assert ARCHITECTURE >= CPCCTC_ONLY | CONTRASTIVE_ONLY | SUPERVISED_ONLY
    assert {
        "CPCCTC", "limitNegsInBatch", "speakerEmbedding", "dropout", "normalizeCPCScore",
        "scoreTemperature", "multihead_rnn",
    } == CONTRASTIVE_ONLY  # fmt: skip
    assert {name for name in ARCHITECTURE if name.startswith("CPCCTC")} - {"CPCCTC"} == CPCCTC_ONLY
    assert {"CTC", "nLevelsPhone", "onEncoder"} == SUPERVISED_ONLY
    assert INHERITED >= CAPTURE_GROUP | PROBE_GROUP
    assert {
        "pathTrain", "pathVal", "pathCaptureDS", "path_phone_data", "load", "pathSeqNoise"
    } == FILES  # fmt: skip
    directories = {
        "pathDB", "pathCaptureSave", "pathCheckpoint", "linsep_logs_dir", "linsep_checkpoint_dir",
        "pathDBNoise", "pathImpulseResponses", "tensorboard",
    }  # fmt: skip
    assert FILES | directories == PATHS


def test_choices_are_those_of_the_registries():
    choices = {action.dest: action.choices for action in build_parser()._actions if action.choices}
    assert {*choices["normMode"]} == NORMS.keys()
    assert {*choices["arMode"]} == {*CPCAR.NETWORKS, "no_ar", "transformer"}
    assert {*choices["samplingType"]} == {*SAMPLINGS}
    *encoders, last = choices["encoder_type"]
    with pytest.raises(UserError, match=f"there are {', '.join(encoders)} and {last}$"):
        build_encoder(SimpleNamespace(encoder_type="another"))
    with pytest.raises(UserError, match=f"choose one of {', '.join(choices['rnnMode'])}$"):
        build_head("another", 8, 8, 4)


LOWEST = {
    0: """CPCCTCSkipBeg CPCCTCSkipEnd limitNegsInBatch speakerEmbedding nEpoch learningRate epsilon
        linsep_lr linsep_epsilon resume_every keep threads max_bad_files beta1 beta2 linsep_beta1
        linsep_beta2 random_seed linsep_hidden""",
    1: """hiddenGar nPredicts CPCCTCNumMatched negativeSamplingExt sizeWindow batchSizeGPU
        max_size_loaded nLevelsGRU nLevelsPhone schedulerRamp save_step logging_step
        n_process_loader linsepBatchSizeGPU linsep_n_epoch linsep_net_layers
        linsep_task_logging_step linsep_classif_each_epochs captureDSfreq captureDStotNr
        captureEachEpochs unit_quality_each_epochs linsep_times knn""",
    2: "hiddenEncoder nClusters",
}


@pytest.mark.parametrize(("lowest", "names"), LOWEST.items())
def test_numbers_below_the_lowest_are_refused_wherever_they_come_from(lowest, names):
    for name in names.split():
        assert vars(build_parser().parse_args([f"--{name}", str(lowest)]))[name] == lowest
        with pytest.raises(UserError, match=rf"^--{name} {lowest - 1}(.0)?: must be "):
            build_parser().parse_args([f"--{name}", str(lowest - 1)])
        if name not in THIS_CALL:
            with pytest.raises(UserError, match=rf"^x.pt: .*--{name} {lowest - 1}(.0)?: must be "):
                stored_arguments({name: lowest - 1}, "x.pt")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--beta2 1", "--beta2 1.0: must be in [0, 1)"),
        ("--CPCCTCLossTemp 0", "--CPCCTCLossTemp 0.0: must be above 0"),
        ("--max_bad_files 1.5", "--max_bad_files 1.5: must be from 0 to 1"),
        ("--captureDSfreq 101", "--captureDSfreq 101: must be from 1 to 100"),
        (f"--random_seed {2**63}", f"must be from 0 to {2**63 - 1}"),
        ("--linsep_lr inf", "--linsep_lr inf: must be a finite number"),
        ("--nEpoch 1e3", "--nEpoch '1e3': must be a whole number"),
        ("--nEp -1", "--nEpoch -1: must be at least 0"),
        ("--nEpoch", "--nEpoch: expected one argument (--help lists the flags)"),
        ("--nEpochs 5", "unrecognized flag --nEpochs: did you mean --nEpoch?"),
        ("--nepoch=5", "unrecognized flag --nepoch: did you mean --nEpoch?"),
        ("-CPCTC", "unrecognized flag -CPCTC: did you mean --CPCCTC?"),
        ("--no-captureEvrything", "did you mean --no-captureEverything?"),
        ("--zzz", "unrecognized flag --zzz (--help lists the flags)"),
        ("speech", "unrecognized arguments: speech (--help lists the flags)"),
        ("--captureC", "ambiguous option: --captureC could match --captureConvRepr, --captureCtx"),
    ],
)
def test_what_can_not_be_read_is_refused_in_one_line(words, reason):
    with pytest.raises(UserError) as refused:
        build_parser().parse_args(words.split())
    assert reason in str(refused.value)
    assert "--no-" not in str(refused.value).replace("--no-captureEv", "")


def test_every_command_names_the_nearest_flag():
    parser = CommandLine(prog="measure.py")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--length")
    assert parser.parse_intermixed_args(["a", "--length", "3", "b"]).files == ["a", "b"]
    part = CommandLine()
    part.add_subparsers().add_parser("measure").add_argument("--length")
    for words, parse in (
        (["a", "--lenght", "3", "b"], parser.parse_intermixed_args),
        (["measure", "--lenght", "3"], part.parse_args),
    ):
        with pytest.raises(UserError, match="unrecognized flag --lenght: did you mean --length?"):
            parse(words)


def test_flags_can_be_abbreviated_as_if_there_were_none_that_turn_switches_off():
    args = build_parser().parse_args(["--normM", "batchNorm", "--nEp", "3"])
    assert (args.normMode, args.nEpoch) == ("batchNorm", 3)
    with pytest.raises(
        UserError,
        match="match --noise_band, .*, --normMode, .*--noSegmentation .--help",
    ):
        build_parser().parse_args(["--no", "batchNorm"])


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("cluster", "RUN OUT DB --getEncoded --seqNorm --pathSeq LIST"),
        ("build_zeroSpeech_features", "DB OUT RUN --encoder_layer --seq_norm --seqL LIST"),
        ("ABX", "from_checkpoint RUN ITEMS DB --getEncoded --seqNorm --maxSizeS 64000 --out OUT"),
    ],
)
def test_commands_take_each_others_spellings_of_flags(module, words):
    args = vars(importlib.import_module(f"eval.{module}").build_parser().parse_args(words.split()))
    assert args.get("seqNorm", args.get("seq_norm"))
    assert any(args.get(name) for name in ("get_encoded", "getEncoded", "encoder_layer"))
    assert args.get("seqList", "LIST") == "LIST"
    assert args.get("max_size_seq", 64000) == 64000


def test_help_explains_every_flag_once():
    parser = build_parser()
    text = parser.format_help()
    for name in vars(parser.parse_args([])):
        assert len(re.findall(rf"^  --{name}\b", text, re.M)) == 1, name
    assert "--no-cap" not in text


def test_help_begins_with_one_line_of_usage_and_ends_with_four_commands():
    text = build_parser().format_help()
    assert text.startswith("usage: train.py --pathDB DIR --pathCheckpoint RUN [flags]\n\n")
    examples = text.partition("\ncommands:\n")[2].replace("\\\n", "").split("\n\n")
    calls = [parse_arguments(text.partition("train.py ")[2].split()) for text in examples]
    assert [(args.onlyCapture, args.only_classif_metric) for args, _ in calls] == [
        (False, False), (False, False), (True, False), (False, True)
    ]  # fmt: skip
    assert calls[1][1] == {"pathCheckpoint"}
    for call in calls:
        check_call(*call)


@pytest.mark.parametrize("path", COMMANDS)
def test_help_of_a_command_begins_with_one_line_of_usage_and_ends_with_examples(path, capsys):
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text, _, examples = capsys.readouterr().out.partition("\nexamples:\n\n")
    usage, blank, *_ = text.splitlines()
    assert re.fullmatch(rf"usage: {Path(path).name} \S.* \[flags\]", usage)
    assert blank == ""
    assert f"python {path} " in examples
    if "COMMAND" not in usage:
        assert set(re.findall(r" (--\w+)", examples)) <= set(re.findall(r" (--\w+)", text))
    place = re.search(r"^sys\.path\.insert\(0, (.+)\)$", Path(module.__file__).read_text(), re.M)
    assert eval(place[1], vars(module) | {"os": os, "Path": Path}) == str(ROOT), "starts anywhere"


def checked(*words):
    args, explicit = parse_arguments(words)
    check_call(args, explicit)
    complete(args, explicit)
    check_arguments(args, explicit)
    return args


@pytest.fixture
def paths(tmp_path):
    """Flags that every training run needs, with an existing database and list."""
    (tmp_path / "db").mkdir()
    (tmp_path / "list.txt").write_text("a\n")
    return ["--pathDB", str(tmp_path / "db"), "--pathCheckpoint", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--nPredicts 13 --CPCCTC --CPCCTCNumMatched 12", "--CPCCTCNumMatched 12"),
        ("--nPredicts 12 --CPCCTC --CPCCTCNumMatched 12 --CPCCTCSelfLoop", "--CPCCTCNumMatched 12"),
        ("--nPredicts 11 --CPCCTC --CPCCTCNumMatched 12 --CPCCTCSelfLoop --CPCCTCLearnBlank",
         "and 2 more"),
        ("--nPredicts 128", "must be under 128"),
        ("--CPCCTC --CPCCTCNumMatched 128", "must be under 128"),
        ("--CPCCTCSelfLoop", "--CPCCTCSelfLoop needs --CPCCTC"),
        ("--CPCCTC --CPCCTCSkipBeg -1", "--CPCCTCSkipBeg -1: must be at least 0"),
        ("--sizeWindow 20500", "such as 20480"),
        ("--learningRate nan", "--learningRate nan"),
        ("--beta1 1", "--beta1 1.0"),
        ("--batchSizeGPU 0", "--batchSizeGPU 0"),
        ("--keep -1", "--keep -1: must be at least 0"),
        ("--clip_grad_norm 0", "--clip_grad_norm 0.0: must be above 0"),
        ("--hiddenGar 128", "--rnnMode transformer needs --hiddenGar (128)"),
        ("--speakerEmbedding 8", "--speakerEmbedding can't be used with --rnnMode transformer"),
        ("--hiddenEncoder 100 --hiddenGar 100", "8 attention heads"),
        ("--scoreTemperature 0", "--scoreTemperature 0.0: must be above 0"),
        ("--normalizeCPCScore --supervised", "--normalizeCPCScore has no effect with --supervised"),
        ("--rnnMode none", "--nPredicts must be 1, not 12"),
        ("--rnnMode none --nPredicts 1 --hiddenGar 128", "--rnnMode none needs --hiddenGar (128)"),
        ("--rnnMode none --nPredicts 1 --speakerEmbedding 8", "used with --rnnMode none"),
        ("--multihead_rnn --rnnMode linear", "--multihead_rnn needs --rnnMode transformer"),
        ("--linearOutput --encoder_type lfb", "--linearOutput needs --encoder_type cpc, not lfb"),
        ("--nPredictsSegment 2", "--nPredictsSegment needs --multiLevel"),
        ("--segmentProminence 0.1", "--segmentProminence needs --multiLevel"),
        ("--freezeFrameModel", "--freezeFrameModel needs --multiLevel"),
        ("--multiLevel --freezeFrameModel", "--freezeFrameModel needs --load"),
        ("--loadOnlyFrameModel", "--loadOnlyFrameModel needs --load"),
        ("--multiLevel --supervised", "--multiLevel can't be used with --supervised"),
        ("--multiLevel --cpc_mode reverse", "--multiLevel can't be used with --cpc_mode"),
        ("--multiLevel --rnnMode linear --speakerEmbedding 8", "isn't supported with --multiLevel"),
        ("--multiLevel --augment_type pitch --augment_past", "use --past_equal_future"),
        ("--multiLevel --CPCCTCNumMatchedSegment 2", "--CPCCTCNumMatchedSegment needs --CPCCTC"),
        ("--multiLevel --CPCCTC --CPCCTCNumMatched 12 --nPredictsSegment 2", "can't be aligned to"),
        ("--multiLevel --adjacentNegatives --negativeSamplingExtSegment 4", "has no effect with"),
        ("--multiLevel --noSegmentation --segmentProminence 0.1", "has no effect with"),
        ("--multiLevel --nPredictsSegment 128", "too few to look 128 segments ahead"),
        ("--multiLevel --hiddenGarSegment 128", "--rnnModeSegment transformer needs"),
        ("--multiLevel --rnnModeSegment none --nPredictsSegment 2", "must be 1, not 2"),
        ("--multiLevel --headWeights 1", "--headWeights needs two values"),
        ("--multiLevel --segmentationMode groundTruthWError", "of labels (groundTruth...) aren't"),
        ("--multiLevel --segmentationMode other", "cosineDissimilarity, scpc, boundaryPredictor"),
        *((f"--multiLevel --{name} 1", f"--{name}: ") for name in REFUSED),
        ("--pathCaptureDS LIST --pathCaptureSave X --captureSegCtx", "--captureSegCtx needs"),
        ("--multiLevel --segmentLevel --pathCaptureDS LIST --pathCaptureSave X --capturePred",
         "no predictions of frames"),
        ("--multiLevel --level segments", "--level needs --supervised_classif_metric or"),
        ("--arMode no_ar --hiddenGar 128", "--arMode no_ar"),
        ("--arMode transformer --nLevelsGRU 2", "--nLevelsGRU 2"),
        ("--abspos", "--abspos needs --arMode transformer"),
        ("--encoder_type mfcc --normMode batchNorm", "--normMode batchNorm needs"),
        ("--captureConvRepr", "--captureConvRepr needs --pathCaptureDS"),
        ("--pathCaptureDS LIST --captureConvRepr", "--captureConvRepr needs --pathCaptureSave"),
        ("--pathCaptureDS LIST --pathCaptureSave X", "nothing to capture"),
        ("--pathCaptureDS LIST --no-captureEverything", "nothing to capture"),
        ("--pathCaptureDS LIST --pathCaptureSave X --capturePhoneAlign", "--path_phone_data"),
        ("--pathCaptureDS LIST --pathCaptureSave X --captureCPCCTCalign", "needs --CPCCTC"),
        ("--pathCaptureDS LIST --pathCaptureSave X --captureEverything --captureDSfreq 5 "
         "--captureDStotNr 5", "choose one"),
        ("--pathCaptureDS LIST --pathCaptureSave X --captureEverything --captureDSfreq 101",
         "from 1 to 100"),
        ("--supervised_classif_metric --linsep_logs_dir X", "--speaker_sep"),
        ("--supervised_classif_metric --speaker_sep", "--linsep_logs_dir"),
        ("--only_classif_metric --speaker_sep", "--only_classif_metric needs --linsep_logs_dir"),
        ("--only_classif_metric --linsep_logs_dir X", "--only_classif_metric needs --speaker_sep"),
        ("--path_phone_data DIR", "DIR: is a folder; its phone labels are DIR/converted_aligned"),
        ("--pathTrain DIR", "--pathTrain DIR: is a folder; give a file"),
        ("--pathTrain DIR/db", "--pathTrain DIR/db: is a folder; give a file"),
        ("--speaker_sep", "--speaker_sep needs --supervised_classif_metric"),
        ("--supervised_classif_metric --linsep_logs_dir X --path_phone_data LIST --CTCphones "
         "--phone_get_encoded", "--CTCphones can't be used with --phone_get_encoded"),
        ("--supervised_classif_metric --linsep_logs_dir X --speaker_sep --CTCphones",
         "--CTCphones needs --path_phone_data"),
        ("--supervised_classif_metric --linsep_logs_dir X --path_phone_data LIST --CTCphones "
         "--knn 1,10", "--knn can't be used with --CTCphones"),
        ("--supervised_classif_metric --linsep_logs_dir X --speaker_sep --linsep_hidden 9 "
         "--linsep_net_layers 2", "choose one"),
        ("--linsep_classif_each_epochs 10,x", "--linsep_classif_each_epochs 'x': must be a whole"),
        ("--CTC", "--CTC needs --supervised"),
        ("--supervised --CTC", "--CTC needs --path_phone_data"),
        ("--supervised --CTC --onEncoder --path_phone_data LIST", "--onEncoder can't be used with"),
        ("--supervised --onEncoder", "--nLevelsPhone and --onEncoder need --path_phone_data"),
        ("--supervised --cpc_mode reverse", "leave out --cpc_mode"),
        ("--cpc_mode none --encoder_type mfcc --arMode no_ar", "nothing to train"),
        ("--pathCaptureDS LIST --pathCaptureSave X --capturePred --supervised", "no predictions"),
        ("--loadCriterion", "--loadCriterion needs --load"),
        ("--gru_level 1", "--gru_level needs --load"),
        ("--onlyCapture --only_classif_metric", "choose one"),
        ("--onlyCapture --restart", "leave out --restart"),
        ("--onlyCapture", "--onlyCapture needs --pathCaptureDS"),
        ("--onlyCapture --tensorboard", "--tensorboard has no effect without training"),
        ("--pathTrain /no/such/list", "--pathTrain /no/such/list: no such file"),
        ("--load a.pt b.pt --loadCriterion", "--loadCriterion: a criterion fits the one model"),
        ("--device cpu --precision bf16", "--precision bf16 needs a CUDA device"),
        ("--nGPU 0", "--nGPU 0"),
        ("--threads 99999999999", "--threads 99999999999: must be from 0 to 1024"),
        ("--hiddenEncoder 100 --arMode transformer --rnnMode linear", "8 attention heads"),
        ("--only_classif_metric --speaker_sep --linsep_logs_dir d --nGPU 2", "one process"),
        ("--arMode lstm", "invalid choice"),
        ("--random_seed -1", "--random_seed"),
        ("--onlyCapture --pathCaptureDS LIST --captureSetStats x --speaker_sep", "no probe"),
        ("--only_classif_metric --speaker_sep --captureConvRepr", "captures nothing"),
    ],
)  # fmt: skip
def test_what_can_not_work_is_refused_with_the_reason(words, reason, paths, tmp_path):
    (tmp_path / "converted_aligned_phones.txt").touch()
    words = words.replace("LIST", str(tmp_path / "list.txt")).replace("DIR", str(tmp_path)).split()
    with pytest.raises(UserError) as refused:
        checked(*paths, *words)
    assert reason.replace("DIR", str(tmp_path)) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_stats_stay_where_captures_are_turned_off():
    args, explicit = parse_arguments(["--no-captureConvRepr"])
    args.pathCaptureDS = "list"  # inherited
    args.captureSetStats = "phoneSim:conv_repr,pictures"
    complete(args, explicit)
    assert args.pathCaptureDS == "list"
    args.captureSetStats = None
    complete(args, explicit)
    assert args.pathCaptureDS is None


def test_a_run_needs_a_place_and_audio(tmp_path):
    with pytest.raises(UserError, match="--pathCheckpoint DIR"):
        checked("--pathDB", str(tmp_path))
    with pytest.raises(UserError, match="no run there to resume; a new one needs --pathDB DIR"):
        checked("--pathCheckpoint", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--restart begins a new run, which needs --pathDB DIR"):
        checked("--pathCheckpoint", str(tmp_path), "--restart")
    with pytest.raises(UserError, match="--pathDB DIR"):
        checked("--pathCheckpoint", str(tmp_path))
    with pytest.raises(UserError, match="--pathDB .*: no such directory"):
        checked("--pathDB", str(tmp_path / "none"), "--pathCheckpoint", str(tmp_path))


def test_an_empty_path_is_no_name_of_the_present_folder(paths, tmp_path):
    for words in (["--pathCheckpoint", ""], ["--pathDB", ""], ["--load", str(tmp_path), ""]):
        with pytest.raises(UserError, match=f"{words[0]}: an empty path"):
            checked(*paths, *words)


def test_a_compiler_that_is_not_there_is_refused(paths, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    checked(*paths)
    with pytest.raises(UserError, match="--compile on a CPU .*there is no /no/such/compiler here"):
        checked(*paths, "--compile")


def test_a_library_that_is_not_there_is_refused(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard needs .*pip install tensorboard"):
        checked(*paths, "--tensorboard")
    checked(*paths, "--tensorboard", "--no-tensorboard")
    monkeypatch.undo()
    (tmp_path / "tensorboard").mkdir()  # as of an earlier run
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="--tensorboard needs"):
        checked(*paths, "--tensorboard", str(tmp_path / "tensorboard"))


def test_without_heads_the_width_is_free(paths):
    for words in ("--supervised", "--cpc_mode none", "--rnnMode linear"):
        checked(*paths, "--hiddenEncoder", "13", "--hiddenGar", "13", *words.split())


def test_contexts_have_the_encoders_channels_where_no_recurrent_network_makes_them(paths):
    assert checked(*paths, "--arMode", "no_ar", "--hiddenEncoder", "64").hiddenGar == 64


def test_every_example_of_the_documentation_is_accepted(paths, tmp_path):
    path = str(tmp_path / "list.txt")
    capture = ["--pathCaptureDS", path, "--pathCaptureSave", str(tmp_path / "save")]
    common = ["--nPredicts", "8", "--CPCCTC", "--CPCCTCNumMatched", "12", "--CPCCTCSelfLoop"]
    checked(*paths, *common, *capture, "--captureEverything", "--path_phone_data", path)
    checked(
        *paths, "--captureSetStats", "reprDiff:cosine,ctx_repr,0.05,../x", "--pathCaptureDS", path
    )
    checked(*paths, "--normMode", "batchNorm", "--rnnMode", "linear")
    checked(*paths, "--rnnMode", "ffd", "--schedulerRamp", "10")


def resumed(words, stored, tmp_path):
    args, explicit = parse_arguments(["--pathCheckpoint", str(tmp_path), *words])
    return args, inherit_args(args, explicit, stored, "the checkpoint")


def test_stored_values_that_are_not_taken_are_not_judged(tmp_path):
    """As the original program takes `--captureEachEpochs 0`, which would divide by zero here."""
    stored = {"captureEachEpochs": 0, "hiddenEncoder": 64}
    args, _ = resumed(["--onlyCapture"], stored, tmp_path)
    assert (args.captureEachEpochs, args.hiddenEncoder) == (10, 64)
    assert resumed(["--captureEachEpochs", "3"], stored, tmp_path)[0].captureEachEpochs == 3
    with pytest.raises(UserError, match="the checkpoint: .*captureEachEpochs"):
        resumed([], stored, tmp_path)


def test_a_resumed_run_takes_each_flag_from_where_its_class_says(tmp_path):
    stored = {"hiddenEncoder": 64, "CPCCTC": True, "batchSizeGPU": 4, "nEpoch": 7, "debug": True,
              "learningRate": 1e-3, "captureEverything": True, "unknown_flag": 3}  # fmt: skip
    words = "--hiddenEncoder 32 --nEpoch 9 --batchSizeGPU 16".split()
    args, said = resumed(words, stored, tmp_path)
    assert (args.hiddenEncoder, args.CPCCTC, args.batchSizeGPU) == (64, True, 4)
    assert (args.nEpoch, args.learningRate, args.captureEverything) == (9, 1e-3, True)
    assert args.debug is False
    assert len(said) == 2
    assert "--hiddenEncoder" in said[1]
    assert "64" in said[1]


def test_a_switch_of_a_resumed_run_can_be_turned_off(tmp_path):
    stored = {"supervised_classif_metric": True, "captureConvRepr": True, "CPCCTC": True}
    words = ["--no-supervised_classif_metric", "--captureConvRepr", "--no-captureConvRepr"]
    args, said = resumed([*words, "--no-CPCCTC"], stored, tmp_path)
    assert (args.supervised_classif_metric, args.captureConvRepr) == (False, False)  # the last
    assert args.CPCCTC is True
    assert said == ["--CPCCTC: using the checkpoint's value, True"]


def test_a_switch_that_is_turned_off_counts_as_not_given(paths):
    off = ["--no-CPCCTCSelfLoop", "--no-speaker_sep", "--no-captureConvRepr", "--no-CTC"]
    assert checked(*paths, *off) == checked(*paths)


def test_a_list_that_is_gone_can_be_given_again(tmp_path):
    (tmp_path / "new").write_text("a")
    stored = {"pathTrain": str(tmp_path / "old"), "random_seed": 3}
    args, _ = resumed(["--pathTrain", str(tmp_path / "new")], stored, tmp_path)
    assert (args.pathTrain, args.random_seed) == (str(tmp_path / "new"), 3)


def test_capture_on_a_checkpoint_takes_what_to_capture_from_the_command_line(tmp_path):
    stored = {"captureConvRepr": True, "pathCaptureDS": "x", "rnnMode": "linear", "pathDB": "db",
              "captureDSfreq": 10, "batchSizeGPU": 4}  # fmt: skip
    args, _ = resumed(["--onlyCapture", "--captureDStotNr", "3"], stored, tmp_path)
    assert (args.captureConvRepr, args.pathCaptureDS, args.captureDSfreq) == (False, None, None)
    assert (args.rnnMode, args.pathDB, args.batchSizeGPU) == ("linear", "db", 4)


def test_a_capture_does_without_the_labels_of_the_run_where_they_are_gone(tmp_path):
    labels = tmp_path / "labels.txt"
    stored = {"path_phone_data": str(labels), "pathDB": str(tmp_path)}
    args, said = resumed(["--onlyCapture"], stored, tmp_path)
    assert args.path_phone_data is None
    assert "labels.txt is gone" in said[0]
    assert resumed([], stored, tmp_path)[0].path_phone_data == str(labels)  # probes need them
    labels.touch()
    args, said = resumed(["--onlyCapture"], stored, tmp_path)
    assert (args.path_phone_data, said) == (str(labels), [])


def test_of_two_exclusive_flags_the_one_given_replaces_the_stored_one(tmp_path):
    args, _ = resumed(["--captureDStotNr", "3"], {"captureDSfreq": 10}, tmp_path)
    assert (args.captureDSfreq, args.captureDStotNr) == (None, 3)


@pytest.mark.parametrize("stored", [{"nPredicts": "many"}, {"arMode": 3}, {"nEpoch": [1, 2]}])
def test_damaged_stored_arguments_are_refused_by_name(stored):
    with pytest.raises(UserError, match=f"some.pt: .*--{next(iter(stored))}"):
        stored_arguments(stored, "some.pt")


def test_stored_arguments_without_an_initialisation_are_those_of_the_original():
    assert stored_arguments({"nPredicts": 3}, "some.pt").initialisation == "original"
    assert stored_arguments({"initialisation": "lecun"}, "some.pt").initialisation == "lecun"


# -------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("case", golden_cases("schedulers"))
def test_golden_learning_rates(case):
    for ramp, step in case.config["combos"]:
        expected = case[f"lr_ramp{ramp}_step{step}"]
        rates = [learning_rate(e, case.config["lr"], ramp, step) for e in range(len(expected))]
        assert_close(torch.tensor(rates, dtype=torch.float64), expected, 1e-12)


# ----------------------------------------------------------------------------------------- files


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            with open(temporary, "w") as file:
                file.write("half of the n")
            raise OSError("disk full")

    pytest.raises(OSError, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_written_files_are_readable_by_others_and_leftovers_go(tmp_path):
    save_tensors(tmp_path / "x.pt", {"a": torch.ones(2)})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.pt").stat().st_mode) == 0o666 & ~umask
    (tmp_path / f"{TEMPORARY_PREFIX}abc.pt").write_text("")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_where_nothing_can_be_written_is_noticed_without_making_it(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b", "--x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(UserError, match=f"--x can't be written: {tmp_path / 'file'} is no dir"):
            check_writable(place, "--x")
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is read-only"):
        check_writable(tmp_path / "a" / "b", "--x")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"gEncoder": Malicious()}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(UserError, match=f"{name}: refused") as refused:
            load_tensors(tmp_path / name)
        assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"\x80\x02J\x01", b"\x80\x02X\x05", b"\x80\x02G\x00", b"PK\x03\x04 torn",
     b"<!doctype html><p>404"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_named_in_one_line(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="x.pt: can't be loaded") as refused:
        load_tensors(tmp_path / "x.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["# Title\n", "<!doctype html>", "hello\n", '"quoted"'])
def test_a_text_is_no_checkpoint_and_pytorch_gives_no_advice(content, tmp_path):
    (tmp_path / "x.pt").write_text(content)
    with pytest.raises(UserError, match="x.pt: can't be loaded.*no PyTorch file") as refused:
        load_tensors(tmp_path / "x.pt")
    assert "weights_only" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 100


def test_a_file_name_that_is_no_text_is_kept_in_json(tmp_path):
    index = {"file": os.fsdecode(b"a\xff\xe9/\\.flac"), "speaker": "\u00e9"}
    save_json(tmp_path / "x.json", index)
    assert load_json(tmp_path / "x.json") == index


def test_a_changed_bit_in_a_tensor_is_noticed(tmp_path):
    weights = torch.arange(1000.0)
    save_tensors(tmp_path / "x.pt", {"a": weights})
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(weights.numpy().tobytes()) + 2001] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x.pt: .*damaged.* checksum of \S*data/0 is wrong"):
        load_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("read", [load_tensors, load_json])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: .*not a regular file"):
        read(tmp_path / "x.pt")


# ----------------------------------------------------------------------------------- checkpoints


def state(position, **more):
    return {
        "gEncoder": {"w": torch.ones(2)}, "cpcCriterion": {}, "optimizer": {}, "best": None,
        "args": {"nPredicts": 3}, "logs": {"epoch": [0]}, "position": list(position), **more,
    }  # fmt: skip


def test_the_newest_checkpoint_is_found_inside_an_epoch_too(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, state((1, 0, 0)), epoch=0)
    save_checkpoint(tmp_path, state((10, 0, 0)), epoch=9)
    (tmp_path / "checkpoint_last.pt").write_text("not numbered")
    assert newest_checkpoint(tmp_path).epoch == 9
    save_checkpoint(tmp_path, state((10, 0, 4)))
    assert newest_checkpoint(tmp_path).state["position"] == [10, 0, 4]
    save_checkpoint(tmp_path, state((11, 0, 0)), epoch=10)
    assert not (tmp_path / "checkpoint_resume.pt").exists()
    assert newest_checkpoint(tmp_path).path.name == "checkpoint_10.pt"


def test_a_stale_resume_file_does_not_hide_a_newer_checkpoint(tmp_path):
    save_checkpoint(tmp_path, state((3, 0, 0)), epoch=2)
    save_checkpoint(tmp_path, state((1, 0, 4)))
    assert newest_checkpoint(tmp_path).epoch == 2


def test_a_directory_of_unreadable_checkpoints_is_never_a_new_run(tmp_path):
    (tmp_path / "checkpoint_1.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"no checkpoint there can be read .*--restart"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", [{"gEncoder": 3}, {"position": [1]}, {"args": []}])
def test_a_checkpoint_with_parts_missing_is_refused(damage, tmp_path):
    save_checkpoint(tmp_path, {**state((1, 0, 0)), "args": {}, **damage}, epoch=0)
    with pytest.raises(UserError, match="checkpoint_0.pt"):
        read_checkpoint(tmp_path / "checkpoint_0.pt")


@pytest.mark.parametrize(
    "logs",
    [
        {"epoch": 3, "iter": [1]},
        {"epoch": ["0"]},
        {"epoch": [0], "iter": ["12"]},
        {"epoch": [0], "locLoss_val": [2.5]},
        {"epoch": [0], "locLoss_val": 2.5},
        {"epoch": [0], "locAcc_val": [[]]},
        {"epoch": [0], "before_training": {"locLoss_val": 2.5}},
    ],
)
def test_damaged_logs_are_refused_or_left_out(logs, tmp_path):
    save_checkpoint(tmp_path, {**state((1, 0, 0)), "logs": logs}, epoch=0)
    with pytest.raises(UserError, match=r"checkpoint_0.pt: (damaged|.*: logs, .*damaged)"):
        check_resumable(read_checkpoint(tmp_path / "checkpoint_0.pt"), {})
    original = {"gEncoder": {}, "cpcCriterion": {}, "optimizer": {}, "best": None}
    save_tensors(tmp_path / "checkpoint_0.pt", original)
    assert read_checkpoint(tmp_path / "checkpoint_0.pt").state["logs"] == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda moments: moments.pop("exp_avg"),
        lambda moments: moments.pop("step"),
        lambda moments: moments.update(step=torch.ones(2)),
        lambda moments: moments.update(exp_avg_sq=torch.ones(3)),
        lambda moments: moments.update(exp_avg=moments["exp_avg"].to_sparse()),
    ],
)
def test_damaged_moments_are_refused(damage):
    def optimizer():
        return torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], fused=True)

    trained = optimizer()
    trained.param_groups[0]["params"][0].grad = torch.ones(2)
    trained.step()
    stored = trained.state_dict()
    load_optimizer(optimizer(), stored, "x.pt")
    damage(stored["state"][0])
    with pytest.raises(UserError, match="x.pt: its optimizer state doesn't fit"):
        load_optimizer(optimizer(), stored, "x.pt")


@pytest.mark.skipif(not (GOLDEN / "checkpoint").is_dir(), reason="no checkpoint of the original")
def test_a_golden_checkpoint_of_the_original_is_completed():
    checkpoint = newest_checkpoint(GOLDEN / "checkpoint")
    assert checkpoint.state["position"] == [checkpoint.epoch + 1, 0, 0]
    assert len(checkpoint.state["logs"]["locLoss_val"]) == checkpoint.epoch + 1
    assert checkpoint.state["args"]["CPCCTC"] is True


def original_with_speakers(tmp_path):
    """A checkpoint of the original whose two speakers it met in the order b, a; its listing."""
    torch.save(([(0, "b/x.flac"), (1, "a/y.flac")], ["b", "a"]), tmp_path / "_seqs_cache.txt")
    weights = torch.arange(6.0).view(2, 3)
    moments = {"exp_avg": weights + 10, "exp_avg_sq": weights + 20, "step": torch.tensor(1.0)}
    content = {
        "gEncoder": {},
        "cpcCriterion": {"speakerEmb.weight": weights},
        "optimizer": {"state": {0: moments}},
    }
    checkpoint = Checkpoint(tmp_path / "checkpoint_0.pt", content, of_original=True)
    return checkpoint, torch.nn.ModuleDict({"speakerEmb": torch.nn.Embedding(2, 3)})


def test_speakers_of_the_original_are_renumbered(tmp_path):
    checkpoint, criterion = original_with_speakers(tmp_path)
    permute_speakers(checkpoint, criterion, ("a", "b"), tmp_path / "_seqs_cache.txt")
    swapped = torch.tensor([[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]])
    moments = checkpoint.state["optimizer"]["state"][0]
    assert torch.equal(checkpoint.state["cpcCriterion"]["speakerEmb.weight"], swapped)
    assert torch.equal(moments["exp_avg"], swapped + 10)
    assert torch.equal(moments["exp_avg_sq"], swapped + 20)


def test_without_their_order_speakers_of_the_original_are_refused(tmp_path):
    checkpoint, criterion = original_with_speakers(tmp_path)
    with pytest.raises(UserError, match="none.txt is needed"):
        permute_speakers(checkpoint, criterion, ("a", "b"), tmp_path / "none.txt")
    with pytest.raises(UserError, match="doesn't list the speakers"):
        permute_speakers(checkpoint, criterion, ("a", "c"), tmp_path / "_seqs_cache.txt")


# ------------------------------------------------------------------------------------------ logs


def test_running_means_weigh_windows():
    running = RunningMeans()
    running.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]]), windows=1)
    running.add(torch.tensor([[4.0, 5.0]]), torch.tensor([[1.0, 0.0]]), windows=2)
    assert running.means() == [[3.0, 4.0], [2.5 / 3, 0.0]]
    assert running.means_since_mark() == running.means()
    running.add(torch.tensor([[7.0, 7.0]]), torch.tensor([[1.0, 1.0]]), windows=1)
    assert running.means_since_mark() == [[7.0, 7.0], [1.0, 1.0]]


def test_a_clock_continues_from_its_state(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.run.logs.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock()
    now[0] = 103.0  # before it is started nothing counts
    assert clock.state() == {"seconds": 0.0, "waited": 0.0, "windows": 0}
    clock.start()
    clock.windows += 6
    now[0] = 105.0
    later = Clock(**clock.state())
    now[0] = 200.0
    later.start()
    later.wait_for(lambda: now.insert(0, 201.0))
    later.windows += 3
    later.stop()
    now[0] = 300.0
    assert later.state() == {"seconds": 3.0, "waited": 1.0, "windows": 9}
    assert str(later) == "3 windows/s, data wait 33.3 %"


def test_running_means_continue_from_their_state():
    batches = [(torch.rand(1, 3), torch.rand(1, 3), n, torch.rand(())) for n in (2, 3, 1)]
    whole, first, second = RunningMeans(), RunningMeans(), RunningMeans()
    for batch in batches:
        whole.add(*batch)
    first.add(*batches[0])
    second.restore(first.state(), "cpu")
    for batch in batches[1:]:
        second.add(*batch)
    assert second.means() == whole.means()
    assert second.mean_gradient_norm() == whole.mean_gradient_norm()


def test_a_value_that_comes_or_goes_leaves_gaps_in_the_logs():
    logs = {"saveStep": 5}
    append_epoch(logs, 0, {"a": 1})
    append_epoch(logs, 1, {"b": 2})
    assert logs == {"saveStep": 5, "epoch": [0, 1], "a": [1, None], "b": [None, 2]}


def test_curves_are_drawn_from_full_partial_and_single_logs(tmp_path):
    rows = [[2.0, 2.5], None, [1.5, 2.0]]
    series = dict.fromkeys(("locLoss_train", "locLoss_val", "locAcc_train", "locAcc_val"), rows)
    probe = {"phone_best_val_acc": [None, None, [0.4]]}
    logs = {"epoch": [0, 1, 2], **series, **probe, "learningRate": [1]}
    draw_curves(logs, tmp_path / "full.png")
    draw_curves({"epoch": [0], "locLoss_val": [[1.0]]}, tmp_path / "small.png")
    draw_curves(logs, tmp_path / "other.png", "matched frame")
    draw_curves(logs, tmp_path / "one.png", None, with_accuracy=False)
    draw_curves(logs, tmp_path / "chance.png", chance=Chance(3.0, 0.1))
    draw_curves(logs | {"phone_baseline_val_acc": [None, None, [0.2]]}, tmp_path / "majority.png")
    pictures = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(pictures) == 6
    assert (tmp_path / "full.png").read_bytes()[:4] == b"\x89PNG"


def test_seeds_of_neighbours_differ_and_repeat():
    seeds = {seed_from(seed, epoch, g) for seed in range(9) for epoch in range(9) for g in range(9)}
    assert len(seeds) == 729
    assert seed_from(1, 23) != seed_from(12, 3)
    assert seed_from("a", 1) == 1229552645


# --------------------------------------------------------------------------------- stop signals


def test_a_stop_signal_waits_for_the_end_of_a_deferred_block():
    done = []
    with StopSignals() as stop, pytest.raises(Stopped) as stopped, stop.deferred():
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
        done.append(2)
    assert done == [1, 2]
    assert stopped.value.status == 143


def test_outside_a_deferred_block_a_stop_signal_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert stopped.value.status == 130
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------ lock


FORK = multiprocessing.get_context("fork")


def hold(directory, ready, with_child):
    """Take the lock and keep it until this process is killed; a child of it lives on."""
    with locked(directory, "--x"):
        child = os.fork() if with_child else None
        if child:
            os.waitid(os.P_PID, child, os.WSTOPPED)
            os.kill(child, signal.SIGCONT)
        if child == 0:  # by now it has closed what it inherited
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            ready.send((os.getpid(), child))
        signal.pause()


@contextlib.contextmanager
def held_elsewhere(directory, with_child=False):
    """A block in which another process has the lock: its process id, and that of its child."""
    theirs, ours = FORK.Pipe()
    process = FORK.Process(target=hold, args=(directory, ours, with_child))
    process.start()
    try:
        yield theirs.recv()
    finally:
        process.kill()
        process.join()


def test_a_second_program_is_refused_with_the_name_of_the_first(tmp_path):
    with held_elsewhere(tmp_path) as (pid, _):
        started = json.loads((tmp_path / LOCK_NAME).read_text())["started"]
        with pytest.raises(UserError) as refused, locked(tmp_path, "--x"):
            pass
    message = str(refused.value)
    assert message.startswith(f"--x {tmp_path}: ")
    for part in (f"process {pid} ", socket.gethostname(), started):
        assert part in message


def test_within_one_process_a_lock_is_given_once_and_goes_without_a_trace(tmp_path):
    for _ in range(2):
        with locked(tmp_path, "--x"):
            with pytest.raises(UserError, match=f"process {os.getpid()} "), locked(tmp_path, "--x"):
                pass
            assert (tmp_path / LOCK_NAME).is_file()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [UserError("no"), Stopped(signal.SIGTERM)])
def test_a_lock_is_given_back_whatever_ends_the_block(error, tmp_path):
    with pytest.raises(type(error)), locked(tmp_path, "--x"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_program_left_is_taken_over(tmp_path, capsys):
    with held_elsewhere(tmp_path) as (pid, _):
        pass
    assert (tmp_path / LOCK_NAME).is_file()
    with locked(tmp_path, "--x"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert f"left behind by process {pid}" in capsys.readouterr().out


def test_a_process_id_in_use_again_keeps_nobody_out(tmp_path):
    owner = {"pid": os.getppid(), "host": socket.gethostname(), "started": "long ago"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(owner))
    with locked(tmp_path, "--x"):
        pass


def test_a_child_of_a_killed_program_keeps_nobody_out(tmp_path):
    with held_elsewhere(tmp_path, with_child=True) as (_, child):
        pass
    try:
        with locked(tmp_path, "--x"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def end_in_the_block(directory):
    with pytest.raises(SystemExit), locked(directory, "--x"):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            assert (directory / LOCK_NAME).is_file()
        raise SystemExit
    os._exit(0)


def test_a_child_that_leaves_the_block_does_not_give_back_its_parents_lock(tmp_path):
    process = FORK.Process(target=end_in_the_block, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_is_left_alone(tmp_path):
    owner = {"pid": 12, "host": "elsewhere", "started": "yesterday"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(owner))
    expected = f"process 12 on elsewhere, since yesterday.*remove {tmp_path / LOCK_NAME}"
    with pytest.raises(UserError, match=expected), locked(tmp_path, "--x"):
        pass
    assert json.loads((tmp_path / LOCK_NAME).read_text()) == owner


@pytest.mark.parametrize(
    ("variable", "words"),
    [("SLURM_JOB_ID", "Slurm job 5"), ("TORCHELASTIC_RUN_ID", "torchrun job 5")],
)
def test_the_lock_of_another_machine_is_taken_over_by_the_same_job(
    variable, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(variable, "5")
    with locked(tmp_path, "--x"):
        owner = (tmp_path / LOCK_NAME).read_text()
    other = owner.replace(json.dumps(socket.gethostname()), '"elsewhere"')
    (tmp_path / LOCK_NAME).write_text(other)
    if variable == "SLURM_JOB_ID":  # another step of the job may be alive, unless it was requeued
        with pytest.raises(UserError, match="another machine"), locked(tmp_path, "--x"):
            pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path, "--x"):
        assert "on elsewhere, since" in (printed := capsys.readouterr().out)
        assert f"same {words}\n" in printed
        assert lost_lock() is None
        (tmp_path / LOCK_NAME).write_text(other)
        assert "was taken over by process" in str(lost_lock())
    assert (tmp_path / LOCK_NAME).read_text() == other  # not that of the block any more
    assert lost_lock() is None
    monkeypatch.setenv(variable, "none")
    with pytest.raises(UserError, match="another machine"), locked(tmp_path, "--x"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": {}}', "\x00"])
def test_a_damaged_lock_file_keeps_nobody_out(content, tmp_path):
    (tmp_path / LOCK_NAME).write_text(content)
    with locked(tmp_path, "--x"):
        pass


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("utils.run.lock.fcntl.flock", flock)
    with locked(tmp_path, "--x"):
        pass
    assert "no locks" in capsys.readouterr().out


def take_in_turns(directory, rounds, clashes):
    """Be the only owner `rounds` times; counts the times when somebody else was, too."""
    while rounds:
        with contextlib.suppress(UserError), locked(directory, "--x"):
            try:
                os.close(os.open(directory / "owner", os.O_CREAT | os.O_EXCL))
                os.unlink(directory / "owner")
            except OSError:
                clashes.value += 1
            rounds -= 1


def test_several_takers_are_never_owners_at_once(tmp_path):
    (tmp_path / "kept").write_text("")
    clashes = FORK.Value("i", 0)
    takers = [FORK.Process(target=take_in_turns, args=(tmp_path, 300, clashes)) for _ in range(3)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert [taker.exitcode for taker in takers] == [0, 0, 0]
    assert clashes.value == 0


def test_a_directory_made_for_the_lock_goes_if_nothing_came_of_it(tmp_path):
    with locked(tmp_path / "a" / "b", "--x"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b", "--x"):
        (tmp_path / "a" / "file").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_directory_that_can_not_be_locked_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--x .*can't be made"), locked(tmp_path / "file", "--x"):
        pass
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(UserError, match="--x .*can't be written"), locked(tmp_path, "--x"):
        pass


CAPTURED = {
    "conv_repr": (torch.float32, (6, 4)),
    "ctx_repr": (torch.float32, (6, 5)),
    "speaker_align": (torch.int64, ()),
    "phone_align": (torch.int64, (6,)),
    "pred": (torch.float32, (3, 4, 2)),
    "cpcctc_align": (torch.int64, (3, 3)),
    "cpcctc_log_scores": (torch.float32, (3, 3, 2)),
}


def captured(n_windows, names=CAPTURED, seed=0):
    """A batch of every kind of captured tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (10 * torch.randn(n_windows, *CAPTURED[name][1], generator=generator)).to(
            CAPTURED[name][0]
        )
        for name in names
    }


def location(window):
    return f"speaker/{window // 3}.flac", 20480 * (window % 3)


def write(directory, sizes, names=CAPTURED, **options):
    """Write batches of these sizes; returns all windows of each name."""
    batches, first = [], 0
    with CaptureWriter(directory, names, **{"epoch": 4, **options}) as writer:
        for seed, size in enumerate(sizes):
            batches.append(captured(size, names, seed))
            writer.write(first, batches[-1], [location(first + row) for row in range(size)])
            first += size
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_capture_comes_back_as_it_was_written(tmp_path):
    written = write(tmp_path / "4", [4, 4, 3], checkpoint="run/checkpoint_4.pt", flags={"x": [1]})
    reader = CaptureReader(tmp_path / "4")
    assert set(reader.names) == set(CAPTURED)
    assert (len(reader), reader.n_windows) == (3, 11)
    assert reader.ranges == [(0, 3), (4, 7), (8, 10)]
    assert (reader.epoch, reader.checkpoint) == (4, "run/checkpoint_4.pt")
    assert reader.flags == {"x": [1]}
    batches = list(reader)
    for name, (dtype, _) in CAPTURED.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), written[name])
        assert batches[0][name].dtype == dtype
    window = reader.window(9)
    assert (window.window, window.file, window.offset) == (9, *location(9))
    assert all(torch.equal(window.tensors[name], written[name][9]) for name in CAPTURED)


def test_files_have_the_names_of_the_original(tmp_path):
    write(tmp_path, [2, 1], ["ctx_repr", "phone_align"])
    assert files(tmp_path) == [
        "ctx_repr/ctx_repr_batch0-1.pt",
        "ctx_repr/ctx_repr_batch2-2.pt",
        "index.json",
        "phone_align/phone_align_batch0-1.pt",
        "phone_align/phone_align_batch2-2.pt",
    ]
    tensor = torch.load(tmp_path / "ctx_repr/ctx_repr_batch0-1.pt", weights_only=True)
    assert isinstance(tensor, torch.Tensor)


def test_batches_are_ordered_by_window_not_by_name(tmp_path):
    write(tmp_path, [8, 4, 90, 5], ["speaker_align"])
    assert CaptureReader(tmp_path).ranges == [(0, 7), (8, 11), (12, 101), (102, 106)]


def test_a_capture_of_the_original_has_no_index(tmp_path):
    written = write(tmp_path, [3], ["ctx_repr"])
    (tmp_path / "index.json").unlink()
    reader = CaptureReader(tmp_path)
    assert (reader.epoch, reader.checkpoint, reader.flags) == (None, None, {})
    window = reader.window(1)
    assert (window.file, window.offset) == (None, None)
    assert torch.equal(window.tensors["ctx_repr"], written["ctx_repr"][1])


def test_reader_reads_only_what_is_asked_for(tmp_path):
    write(tmp_path, [2, 2])
    (tmp_path / "pred" / "pred_batch0-1.pt").write_bytes(b"damaged")
    reader = CaptureReader(tmp_path, ["ctx_repr", "speaker_align"])
    assert reader.names == ("ctx_repr", "speaker_align")
    assert all(batch.keys() == {"ctx_repr", "speaker_align"} for batch in reader)
    with pytest.raises(UserError, match="cpcctc_x not captured, only conv_repr, cpcctc_align"):
        CaptureReader(tmp_path, ["cpcctc_x"])


def test_tensors_are_stored_on_their_own_and_in_their_type(tmp_path):
    everything = torch.randn(2, 1000, 1000, dtype=torch.bfloat16)
    tensors = {
        "ctx_repr": everything[:, :3, :4].requires_grad_(),
        "speaker_align": torch.tensor([1, 2], dtype=torch.int32),
        "conv_repr": torch.randn(4, 2, 2)[:2],
    }
    with CaptureWriter(tmp_path, tensors, epoch=0) as writer:
        writer.write(0, {**tensors, "pred": None}, [("a", 0), ("a", 1)])
    (batch,) = CaptureReader(tmp_path)
    assert batch["ctx_repr"].dtype == torch.float32
    assert batch["speaker_align"].dtype == torch.int64
    assert not batch["ctx_repr"].requires_grad
    for name in tensors:
        assert (tmp_path / name / f"{name}_batch0-1.pt").stat().st_size < 5000


def test_rows_and_locations_must_agree(tmp_path):
    writer = CaptureWriter(tmp_path, ["ctx_repr"], epoch=0)
    with pytest.raises(ValueError, match="ctx_repr: 3 rows, 2 locations"):
        writer.write(0, captured(3), [location(0), location(1)])


def test_an_earlier_capture_is_replaced_and_nothing_else(tmp_path):
    directory = tmp_path / "4"
    write(directory, [4, 4])
    kept = {
        "ctx_repr/notes.txt",
        "ctx_repr/conv_repr_batch0-3.pt",
        "mine/ctx_repr_batch0-3.pt",
        "ctx_repr_batch0-3.pt",
        "ctx_repr/ctx_repr_batch0-3.pt.bak",
    }
    for name in kept:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("mine")
    (directory / "ctx_repr" / ".writing-1.pt").write_text("of a killed run")
    (directory / "begun").mkdir()
    (directory / "begun" / ".writing-1.pt").write_text("of a run killed before its first file")
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, [1], ["phone_align"])
    (directory / "linked").symlink_to(elsewhere / "phone_align")
    (directory / "pictures").mkdir()
    (directory / "pictures" / "window_00000.png").write_text("of the earlier one")

    written = write(directory, [5], ["ctx_repr"])
    assert set(files(directory)) == kept | {"index.json", "ctx_repr/ctx_repr_batch0-4.pt"}
    assert "phone_align/phone_align_batch0-0.pt" in files(elsewhere)
    assert CaptureReader(directory).n_windows == len(written["ctx_repr"])


def test_the_writer_reports_what_it_replaced(tmp_path):
    assert CaptureWriter(tmp_path, ["ctx_repr"], epoch=0).removed == 0
    write(tmp_path, [4, 4], ["ctx_repr", "pred"])
    assert CaptureWriter(tmp_path, ["ctx_repr"], epoch=0).removed == 4


def test_what_would_be_lost_is_not_replaced(tmp_path):
    refuse_to_lose(tmp_path / "none", ["pred"])
    write(tmp_path, [4], ["ctx_repr", "pred"])
    refuse_to_lose(tmp_path, ["pred", "conv_repr", "ctx_repr"])
    with pytest.raises(UserError, match=f"{tmp_path}: holds a capture of ctx_repr, which this"):
        refuse_to_lose(tmp_path, ["pred", "conv_repr"])


def test_directories_are_made_even_without_a_batch(tmp_path):
    with CaptureWriter(tmp_path / "0", ["pred", "ctx_repr"], epoch=0):
        pass
    assert (tmp_path / "0" / "pred").is_dir()
    with pytest.raises(UserError, match="holds no capture"):
        CaptureReader(tmp_path / "0")


def test_a_capture_that_failed_has_no_index(tmp_path):
    write(tmp_path, [2], ["ctx_repr"])
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        CaptureWriter(tmp_path, ["ctx_repr"], epoch=5),
    ):
        raise RuntimeError("out of memory")
    assert files(tmp_path) == []


def test_two_processes_write_one_capture(tmp_path):
    write(tmp_path, [7], ["ctx_repr"])  # an earlier one
    sizes = [3, 3, 2, 2]
    first_writer = CaptureWriter(tmp_path, ["ctx_repr"], epoch=1)
    other_writer = pickle.loads(pickle.dumps(first_writer))
    for batch, size in enumerate(sizes):
        first = sum(sizes[:batch])
        windows = range(first, first + size)
        tensors = {"ctx_repr": torch.tensor(windows).float().view(-1, 1, 1)}
        writer = other_writer if batch % 2 else first_writer
        writer.write(first, tensors, [location(window) for window in windows])
    first_writer.windows += other_writer.windows
    first_writer.close()
    reader = CaptureReader(tmp_path)
    assert reader.ranges == [(0, 2), (3, 5), (6, 7), (8, 9)]
    assert torch.cat([batch["ctx_repr"] for batch in reader]).flatten().tolist() == [*range(10)]
    assert [reader.location(window) for window in range(10)] == [location(w) for w in range(10)]
    assert json.loads((tmp_path / "index.json").read_text())["windows"][9]["window"] == 9


def test_an_unwritable_directory_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/3: can't be written.*pathCaptureSave"):
        CaptureWriter(tmp_path / "file" / "3", ["ctx_repr"], epoch=3)
    (tmp_path / "9").write_text("")
    with pytest.raises(UserError, match=r"/9: can't be written"):
        CaptureWriter(tmp_path / "9", ["ctx_repr"], epoch=9)


def _write_until_full(directory, said):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    writer = CaptureWriter(directory, ["ctx_repr"], epoch=0)
    try:
        writer.write(0, {"ctx_repr": torch.zeros(2, 300, 300)}, [location(0), location(1)])
    except UserError as error:
        said.put(str(error))


def test_a_full_disk_is_one_clear_error(tmp_path):
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    spawn = multiprocessing.get_context("spawn")
    said = spawn.SimpleQueue()
    process = spawn.Process(target=_write_until_full, args=(tmp_path / "0", said))
    process.start()
    process.join()
    assert process.exitcode == 0
    message = said.get()
    assert message.startswith(f"{tmp_path / '0'}: can't be written (")
    assert "File too large" in message
    assert files(tmp_path) == []  # no part of a file is left


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, [2, 2], ["ctx_repr", "pred"])
    (tmp_path / "pred" / "pred_batch2-3.pt").unlink()
    with pytest.raises(UserError, match=r"pred/pred_batch2-3\.pt: missing"):
        CaptureReader(tmp_path)
    assert len(CaptureReader(tmp_path, ["ctx_repr"])) == 2


def test_lost_windows_are_counted(tmp_path):
    write(tmp_path, [2, 3], ["ctx_repr"])
    (tmp_path / "ctx_repr" / "ctx_repr_batch2-4.pt").unlink()
    with pytest.raises(UserError, match="files of window 2 and 2 others are missing"):
        CaptureReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no tensor", "short", "number", "list"])
def test_a_damaged_file_is_named(content, tmp_path):
    write(tmp_path, [2, 2], ["ctx_repr"])
    path = tmp_path / "ctx_repr" / "ctx_repr_batch2-3.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        value = {"short": torch.zeros(1, 6, 5), "number": torch.tensor(2.0), "list": [1, 2]}
        torch.save(value[content], path)
    reader = CaptureReader(tmp_path)
    reader.window(1)
    with pytest.raises(UserError, match=r"ctx_repr/ctx_repr_batch2-3\.pt: .*(damaged|refused)"):
        reader.window(2)


@pytest.mark.parametrize("index", ["[]", '{"windows": [{"window": 0}]}', '{"windows": 3}', "{"])
def test_a_damaged_index_is_named(index, tmp_path):
    write(tmp_path, [2], ["ctx_repr"])
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json"):
        CaptureReader(tmp_path)


def test_files_of_two_captures_are_not_mixed(tmp_path):
    write(tmp_path, [4, 4], ["ctx_repr"])
    torch.save(torch.zeros(6, 6, 5), tmp_path / "ctx_repr" / "ctx_repr_batch0-5.pt")
    with pytest.raises(UserError, match="two captures, with windows 0-3 and 0-5"):
        CaptureReader(tmp_path)


def test_what_there_is_instead(tmp_path):
    write(tmp_path / "2", [2], ["ctx_repr"])
    write(tmp_path / "10", [2], ["ctx_repr"])
    with pytest.raises(UserError, match="choose an epoch: 2, 10$"):
        CaptureReader(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        CaptureReader(tmp_path / "3")
    for window in (-1, 2):
        with pytest.raises(UserError, match=f"no window {window} .* has 0 to 1"):
            CaptureReader(tmp_path / "2").window(window)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({}, ["#0", "#1", "#2"]),
        ({"CPCCTCLearnBlank": False, "CPCCTCSelfLoop": False}, ["1", "2", "3"]),
        ({"CPCCTCLearnBlank": False, "CPCCTCSelfLoop": True}, ["self", "1", "2"]),
        ({"CPCCTCLearnBlank": True, "CPCCTCSelfLoop": True}, ["blank", "self", "1"]),
    ],
)
def test_names_of_predictions_are_in_the_order_of_the_criterion(flags, names):
    assert prediction_names(3, flags) == names


def test_a_lack_of_memory_is_reported_in_one_line(capsys):
    with ends_refused(capsys, rf"tried to allocate {2**60} bytes. .* Smaller batches"):
        command(lambda argv: torch.empty(2**58))()
    with pytest.raises(RuntimeError, match="[Ss]hape"):  # another error is as it was
        command(lambda argv: torch.empty(2).view(3))()


@pytest.mark.parametrize("script", ["train.py", "eval/ABX.py", "utils/corpus/make_split.py"])
def test_a_system_without_fcntl_is_refused_in_one_line(script):
    """As Windows is, also where only --help is asked for."""
    code = "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = [sys.argv[1], '--help']; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / script)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: this runs on Linux and macOS; on Windows, use WSL\n"


@pytest.mark.parametrize("read", [load_tensors, load_json, load_array])
def test_an_empty_file_is_called_empty(read, tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises((UserError, OSError), match="empty"):
        read(tmp_path / "x")


def test_an_array_that_its_file_can_not_hold_is_refused(tmp_path):
    content = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 64)}
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, content)
    with pytest.raises(ValueError, match="allocate"):
        load_array(tmp_path / "x.npy")
    with pytest.raises(UserError, match="--clusters .*x.npy: holds no centers"):
        read_centers(str(tmp_path / "x.npy"), "--clusters")
