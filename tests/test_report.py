"""Tests of the pictures and of the report: what is in them, from captures and runs whose content
is known, and that a browser shows all of it."""

import base64
import html
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import train
from dataset import AudioDataset
from tests.helpers import COMPACT_GOLDEN, ends_refused
from utils.capture import CapturedWindow, CaptureReader, CaptureWriter
from utils.data.corpus import scan_corpus
from utils.data.labels import read_phone_labels
from utils.files import save_json
from utils.misc import SAMPLE_RATE, Chance, UserError
from utils.report import compare, line_chart, pictures, plot_capture, summary
from utils.report.elements import MAX_ROWS
from utils.report.line_chart import Level, Line, draw_lines, thinned, ticks
from utils.report.markup import Markup, join, printable, tag
from utils.report.page import REPORT, RunReport
from utils.report.plots import save_figure
from utils.report.run_record import RECORD, RunRecord, epoch_speed, machine_in_words
from utils.run.flags import build_parser
from utils.run.machine import device_from

N_FRAMES, N_MATCHED, N_PREDICTIONS = 64, 6, 5
N_POSITIONS = N_FRAMES - N_MATCHED
FLAGS = {"sizeWindow": 160 * N_FRAMES, "CPCCTCSelfLoop": True, "CPCCTCLearnBlank": False}


def write_capture(directory, names=plot_capture.DRAWN, flags=FLAGS, pathDB=None):
    """Four windows of one or two files: two phones of 32 frames, whose features differ."""
    phones = torch.arange(N_FRAMES).ge(32).long().expand(4, -1)
    align = torch.tensor([0, 1, 1, 2, 3, 4]).expand(4, N_POSITIONS, -1)
    chosen = torch.nn.functional.one_hot(align, N_PREDICTIONS)
    tensors = {
        "conv_repr": torch.eye(2)[phones],
        "ctx_repr": torch.eye(2)[phones] + 0.1,
        "speaker_align": torch.tensor([7, 7, 7, 8]),
        "phone_align": phones,
        "seg_boundaries": torch.eye(N_FRAMES).long()[[0, 32]].sum(0).expand(4, -1),
        "pred": torch.zeros(4, N_POSITIONS, 2, N_PREDICTIONS),
        "cpcctc_align": align,
        "cpcctc_log_scores": -5.0 + 4 * chosen,
    }
    flags = {**flags, "pathDB": str(pathDB)} if flags and pathDB else flags
    with CaptureWriter(directory, names, epoch=3, flags=flags) as writer:
        offsets = [("7/a.wav", 0), ("7/a.wav", 10240), ("7/a.wav", 20480), ("8/b.wav", 4240)]
        writer.write(0, tensors, offsets)
    return directory


@pytest.fixture
def database(tmp_path):
    """7/a.wav, which ends in window 2, and 8/b.wav: each sample says where it is."""
    for name, length, sign in (("7/a.wav", 26600, 1), ("8/b.wav", 20000, -1)):
        path = tmp_path / "db" / name
        path.parent.mkdir(parents=True)
        soundfile.write(path, sign * np.arange(1, length + 1) / 2**15, SAMPLE_RATE, "PCM_16")
    return tmp_path / "db"


def panels(directory, window=0, symbols=None, position=None, waveform=None):
    reader = CaptureReader(directory)
    return plot_capture.draw_window(
        reader.window(window), waveform, symbols or {}, reader.flags, "", position
    )


def axes_of(figure):
    """All axes but those of colour bars."""
    return [axes for axes in figure.axes if not axes.get_label().startswith("<colorbar")]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_command_draws_the_first_windows_beside_the_capture(tmp_path, database):
    capture = write_capture(tmp_path / "3", ["phone_align", "ctx_repr"], pathDB=database)
    script = Path(plot_capture.__file__)
    finished = subprocess.run(
        [sys.executable, "-W", "error", script, "3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [f"3/pictures/window_0000{i}.png" for i in range(4)]
    for i in range(4):
        assert imread(capture / "pictures" / f"window_0000{i}.png").std() > 0.1
    assert len(CaptureReader(capture)) == 1  # pictures are no part of the capture


def test_chosen_windows_go_where_they_should(tmp_path, capsys):
    capture = write_capture(tmp_path / "3", ["cpcctc_align"])
    plot_capture.main([str(capture), "--windows", "3", "1", "--out", str(tmp_path / "out" / "x")])
    assert sorted(p.name for p in (tmp_path / "out" / "x").iterdir()) == [
        "window_00001.png",
        "window_00003.png",
    ]
    assert not (capture / "pictures").exists()


def test_a_whole_capture_has_all_panels(tmp_path):
    figure = panels(write_capture(tmp_path), waveform=np.zeros(10240, np.float32))
    labels = [axes.get_ylabel() for axes in axes_of(figure)]
    assert labels.count("frequency (kHz)") == 1
    assert labels.count("time (s)") == 2
    assert labels.count("matched frame after it") == 1
    assert labels.count("prediction") == 1
    assert len(axes_of(figure)) == 1 + 2 + 1 + plot_capture.N_ANCHORS


def test_similarity_shows_the_phones_as_blocks(tmp_path):
    figure = panels(write_capture(tmp_path, ["conv_repr", "phone_align"]))
    (matrix,) = (axes for axes in axes_of(figure) if axes.images)
    similarity = np.asarray(matrix.images[0].get_array())
    phone = np.arange(N_FRAMES) >= 32
    assert np.allclose(similarity, phone[:, None] == phone[None])
    boundaries = {line.get_xdata()[0] for line in matrix.lines}
    assert 0.32 in boundaries


def test_phones_are_written_with_their_symbols(tmp_path):
    capture = write_capture(tmp_path, ["phone_align", "ctx_repr"])
    assert set(texts(panels(capture, symbols={0: "SIL"}))) == {"SIL", "1"}


def test_log_scores_carry_the_alignment_and_the_phones(tmp_path):
    capture = write_capture(tmp_path)
    matrices = axes_of(panels(capture, position=27))[-plot_capture.N_ANCHORS :]
    for at, axes in enumerate(matrices, 27):
        scores = np.asarray(axes.images[0].get_array())
        path = axes.lines[0]
        assert scores.shape == (N_PREDICTIONS, N_MATCHED)
        assert path.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
        assert path.get_ydata().tolist() == scores.argmax(axis=0).tolist() == [0, 1, 1, 2, 3, 4]
        # The boundary is before frame 32, which is matched as number 32 - at.
        lines = [line.get_xdata()[0] for line in axes.lines[1:]]
        assert lines == ([32 - at - 0.5] if 2 <= 32 - at <= N_MATCHED else [])
    names = [label.get_text() for label in matrices[0].get_yticklabels()]
    assert names == ["self", "1", "2", "3", "4"]


def test_masked_scores_do_not_set_the_scale(tmp_path):
    scores = torch.linspace(-20, -1, 2 * 6 * 5).view(2, 6, 5).clone()
    scores[:, :3, 4] = -1000
    tensors = {"cpcctc_log_scores": scores}
    place = plot_capture.Figure().subfigures()
    plot_capture.draw_log_scores(place, 0.1, tensors, list("abcde"), [])
    low, high = place.axes[0].images[0].get_clim()
    assert -20 <= low < -15
    assert high == -1


def test_alignment_is_drawn_at_its_time(tmp_path):
    figure = panels(write_capture(tmp_path, ["cpcctc_align"]))
    (axes,) = (axes for axes in axes_of(figure) if axes.images)
    image = axes.images[0]
    assert np.asarray(image.get_array()).shape == (N_MATCHED, N_POSITIONS)
    assert image.get_extent() == pytest.approx([0, N_POSITIONS / 100, 0.5, N_MATCHED + 0.5])
    assert axes.get_xlim() == pytest.approx((0, N_FRAMES / 100))


def test_phone_boundaries_run_through_the_alignment(tmp_path):
    figure = panels(write_capture(tmp_path, ["cpcctc_align", "phone_align"]))
    (axes,) = (axes for axes in axes_of(figure) if axes.images)
    (line,) = axes.lines
    # From position 30, whose middle is at 0.305 s, frame 32 is the second matched one.
    matched = np.interp(0.305, line.get_xdata()[::-1], line.get_ydata()[::-1])
    assert matched == pytest.approx(1.5)


@pytest.mark.parametrize("flags", [FLAGS, {}])
@pytest.mark.parametrize(
    "names",
    [
        ["conv_repr"],
        ["ctx_repr", "speaker_align"],
        ["phone_align"],
        ["cpcctc_align"],
        ["cpcctc_log_scores"],
        ["cpcctc_log_scores", "phone_align", "pred"],
    ],
)
def test_a_part_is_drawn_as_well(names, flags, tmp_path, capsys):
    capture = write_capture(tmp_path, names, flags)
    plot_capture.main([str(capture), "--windows", "1"])
    assert imread(tmp_path / "pictures" / "window_00001.png").std() > 0.02


def test_audio_alone_is_drawn_and_nothing_is_refused(tmp_path, database, capsys):
    capture = write_capture(tmp_path / "3", ["pred"], pathDB=database)
    plot_capture.main([str(capture), "--windows", "1"])
    assert (capture / "pictures" / "window_00001.png").exists()
    with ends_refused(capsys, "nothing to draw: no audio.*no picture of pred alone"):
        plot_capture.main([str(write_capture(tmp_path / "4", ["pred"]))])


def test_audio_is_that_of_the_window_across_files(tmp_path, database):
    reader = CaptureReader(write_capture(tmp_path / "3", pathDB=database))
    for number, first in ((0, 1), (1, 10241)):
        waveform = plot_capture.find_waveform(reader, reader.window(number), None)
        expected = np.arange(first, first + 10240) / 2**15
        assert np.allclose(waveform, expected)
    # Window 3 begins at sample 4240 of the second file, so window 2 holds those before.
    waveform = plot_capture.find_waveform(reader, reader.window(2), None)
    own, other = waveform[:6000], waveform[6000:]
    assert np.allclose(own, np.arange(20481, 26481) / 2**15)
    assert np.allclose(other, -np.arange(1, 4241) / 2**15)
    title = plot_capture.title_of(
        reader.window(2), *plot_capture.file_border(reader, reader.window(2))
    )
    assert title == "window 2, 7/a.wav from 1.28 s, speaker 7, after 0.38 s 8/b.wav"


def test_audio_from_a_pipe_is_found(tmp_path):
    """Its header gives no length."""
    path, samples = tmp_path / "a.flac", np.arange(30_000, dtype=np.int16)
    soundfile.write(path, samples, SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    path.write_bytes(content)
    waveform = np.zeros(10_240, np.float32)
    plot_capture._read_into(waveform, path, 20_480)
    assert np.array_equal(waveform[:9_520] * 2**15, samples[20_480:])
    assert not waveform[9_520:].any()


@pytest.mark.parametrize(("file", "speaker"), [("203/1/a.wav", "203"), ("a.wav", "2"), (None, "2")])
def test_the_speaker_is_named_by_the_folder_where_there_is_one(file, speaker):
    window = CapturedWindow(0, {"speaker_align": torch.tensor(2)}, file, 0)
    assert plot_capture.title_of(window).endswith(f", speaker {speaker}")


def test_missing_audio_is_said_or_refused(tmp_path, capsys):
    capture = write_capture(tmp_path / "3", ["phone_align"], pathDB=tmp_path / "gone")
    plot_capture.main([str(capture), "--windows", "0"])
    assert "gone/7/a.wav: No such file or directory; drawn without audio" in capsys.readouterr().out
    with ends_refused(capsys, r"elsewhere/7/a\.wav: No such file"):
        plot_capture.main([str(capture), "--pathDB", str(tmp_path / "elsewhere")])
    (capture / "index.json").unlink()
    plot_capture.main([str(capture), "--windows", "0"])
    with ends_refused(capsys, r"has no index\.json, so the audio"):
        plot_capture.main([str(capture), "--pathDB", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--windows", "4"], "no window 4 .* has 0 to 3"),
        (["--position", "51"], "--position 51: must be 0 to 50"),
        (["--position", "-1"], "--position -1: must be"),
        (["--phones", "none.txt"], r"none\.txt: can't be read"),
        (["--out", "/dev/null/x"], "/dev/null/x: can't be written.*--out"),
    ],
)
def test_wrong_flags_are_refused(words, said, tmp_path, capsys):
    with ends_refused(capsys, said):
        plot_capture.main([str(write_capture(tmp_path)), *words])


def test_a_wrong_line_of_a_symbol_file_is_named_and_cut(tmp_path, capsys):
    path, capture = tmp_path / "phones.txt", str(write_capture(tmp_path / "capture"))
    path.write_text("0 SIL\n1-1-1 " + "7 " * 2000)
    with pytest.raises(SystemExit):
        plot_capture.main([capture, "--phones", str(path)])
    error = capsys.readouterr().err
    assert "phones.txt, line 2: not `id symbol`: '1-1-1 7 7" in error
    assert len(error) < 200 + len(str(path))


def test_symbols_are_those_given_or_beside_the_labels(tmp_path):
    (tmp_path / "phones.txt").write_text("0 SIL\n\n12 ɑː\n")
    (tmp_path / "other.txt").write_text("0 a\n")
    flags = {"path_phone_data": str(tmp_path / "converted_aligned_phones.txt")}
    assert plot_capture.find_symbols(None, flags) == {0: "SIL", 12: "ɑː"}
    assert plot_capture.find_symbols(tmp_path / "other.txt", flags) == {0: "a"}
    for none in ({}, {"path_phone_data": None}, {"path_phone_data": "no/labels.txt"}):
        assert plot_capture.find_symbols(None, none) == {}


# ------------------------------------------------------------------------- the report of a real run

HOSTILE = "</code></title><script>document.title='taken'</script><img src=x onerror=alert(1)>&\"'"
SECTIONS = (
    "Training", "Probes", "Stats", "Capture", "Corpus", "Speed and memory", "Command and flags",
    "Epochs",
)  # fmt: skip
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian's package)")


class Page(html.parser.HTMLParser):
    """What is on a page: its tags, its text, the cells of each row of its tables."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.texts, self.rows, self.open = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "img"):
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def named(self, name):
        return [attributes for other, attributes in self.tags if other == name]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def row(self, first):
        (found,) = (row for row in self.rows if row and row[0] == first)
        return found


@pytest.fixture(scope="module")
def reported_run(tiny_corpus, tmp_path_factory):
    """A run with probes, captures and stats, in a directory with a hostile name."""
    place = tmp_path_factory.mktemp("reported")
    run, phones = place / "<img src=x onerror=alert(1)>", f"{tiny_corpus}/phones.txt"
    words = (
        "--hiddenEncoder 8 --hiddenGar 8 --rnnMode linear --negativeSamplingExt 4 --nPredicts 2 "
        "--sizeWindow 3200 --nEpoch 2 --captureEverything --captureEachEpochs 1 "
        "--supervised_classif_metric --speaker_sep --linsep_classif_each_epochs 1 "
        "--linsep_n_epoch 2"
    ).split()
    paths = {
        "pathDB": f"{tiny_corpus}/audio",
        "pathTrain": f"{tiny_corpus}/train.txt",
        "pathVal": f"{tiny_corpus}/test.txt",
        "pathCaptureDS": f"{tiny_corpus}/test.txt",
        "path_phone_data": phones,
        "pathCheckpoint": run,
        "pathCaptureSave": place / "captures",
        "linsep_logs_dir": place / "probes",
        "captureSetStats": f"reprDiff:cosine,ctx_repr,0.05,{place / 'stats'}",
    }
    flags = [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
    assert not train.main([*words, *flags])
    return run / REPORT


def test_a_report_holds_the_whole_run_and_needs_no_network(reported_run):
    content = reported_run.read_text(encoding="utf-8")
    page = Page(content)
    text = page.text
    assert all(section in text for section in SECTIONS)
    assert "2 of 2 epochs done" in text
    for flag in ("--sizeWindow", "--captureEverything"):
        assert flag in text
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) >= 3  # confusions, stat, capture
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) >= 6
    assert "http://" not in re.sub(r'xmlns="[^"]*"', "", content)


@needs_chromium
def test_a_browser_shows_the_report(reported_run, tmp_path):
    copy = shutil.copy(reported_run, tmp_path / "report.html")
    browser = (
        "chromium --headless --no-sandbox --disable-gpu --disable-background-networking "
        "--no-first-run --window-size=1280,2000"
    ).split()
    for action in ("--dump-dom", f"--screenshot={tmp_path / 'report.png'}"):
        words = [*browser, f"--user-data-dir={tmp_path / 'profile'}", action, f"file://{copy}"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        if action == "--dump-dom":
            assert all(section in done.stdout for section in SECTIONS)
            assert "2 of 2 epochs done" in done.stdout
    assert (tmp_path / "report.png").stat().st_size > 50_000


# -------------------------------------------------------------------- the report of an invented run


def arguments(directory, **flags):
    """The flags of a run with probes, stats and captures below `directory`."""
    args = build_parser().parse_args([])
    chosen = {
        "pathCheckpoint": str(directory / "run"),
        "nEpoch": 40,
        "random_seed": 1,
        "CPCCTCSkipBeg": 1,
        "supervised_classif_metric": True,
        "linsep_logs_dir": str(directory / "probes"),
        "linsep_classif_each_epochs": 4,
        "pathCaptureDS": "list.txt",
        "pathCaptureSave": str(directory / "captures"),
        "captureEachEpochs": 5,
        "captureSetStats": "invented",
        **flags,
    }
    assert chosen.keys() <= vars(args).keys()
    vars(args).update(chosen)
    return args


def invented_logs(n_epochs, n_steps=3):
    """Logs whose loss falls from 5; probes every 4 epochs, stats every 5."""

    def rows(start, slope):
        return [[start + slope * e / n_epochs + 0.1 * k for k in range(n_steps)] for e in epochs]

    def every(n, value):
        return [value(e) if e % n == 0 else None for e in epochs]

    epochs = range(n_epochs)
    return {
        "epoch": list(epochs),
        "saveStep": 5,
        "before_training": {"locLoss_val": [5.5] * n_steps, "locAcc_val": [0.01] * n_steps},
        "iter": [10] * n_epochs,
        "locLoss_train": rows(4.9, -2),
        "locAcc_train": rows(0.1, 0.5),
        "locLoss_val": rows(5.0, -2),
        "locAcc_val": rows(0.08, 0.5),
        "gradNorm_train": [1.5] * n_epochs,
        "learningRate": [2e-4] * n_epochs,
        "phone_best_val_acc": every(4, lambda e: [0.3 + 0.001 * e]),
        "phone_best_train_acc": every(4, lambda e: [0.4]),
        "phone_baseline_val_acc": every(4, lambda e: [0.125]),
        "speaker_best_val_per": every(4, lambda e: [0.5]),
        "size_ctx_repr_mean": every(5, lambda e: 0.25 * e),
        **{f"size_ctx_repr_part_{k}": every(5, lambda e, k=k: float(k)) for k in range(1, 4)},
    }


def speed(epoch, **more):
    return {
        "seconds": 4.0, "windows": 1000, "waited": 0.1, "memory": 2**30, "gpu_memory": None,
        "machine": "CPU", "finished": 1.7e9 + 60 * epoch, **more,
    }  # fmt: skip


def invented_set(title):
    """What the report asks of an AudioDataset."""
    return SimpleNamespace(
        title=title, utterances=[0], n_unlabelled=0, hours=1.0, n_windows=1, size_window=160,
        speakers=np.array([0]),
    )  # fmt: skip


def draw_picture(path, color="red"):
    figure = Figure(figsize=(2, 1), facecolor=color)
    save_figure(figure, path)
    return path.read_bytes()


def report_of(
    args, logs, command=("python", "train.py"), sets=(), labels=None, stats=None, **of_criterion
):
    """Write the report as after every epoch of the logs; its text."""
    defaults = build_parser().parse_args([])
    report = RunReport(args, defaults, list(command), sets, labels, stats, **of_criterion)
    for epoch in logs["epoch"][:-1]:
        report.record.add(epoch, speed(epoch), report.command)
        report.record.reported = epoch
    report.write(logs, speed(logs["epoch"][-1]))
    return Path(args.pathCheckpoint, REPORT).read_text(encoding="utf-8")


def test_the_page_says_how_far_the_run_is_and_how_good(tmp_path):
    chance = Chance(5.6, 0.008)
    read = Page(report_of(arguments(tmp_path), invented_logs(11), chance=chance))
    assert [a for name, a in read.tags if name == "h1"]
    text = read.text
    assert "11 of 40 epochs done" in text
    assert "about 29 min to go" in text  # a minute an epoch
    last = 5.0 - 2 * 10 / 11 + 0.1
    assert f"validation loss {last:.4g} best {last:.4g}, epoch 10" in text
    assert f"validation accuracy {100 * (0.18 + 0.5 * 10 / 11):.1f} %" in text
    assert "windows/s 250 data wait 2.5 %" in text
    assert "peak memory 1.00 GiB" in text
    assert "before training 5.5 chance 5.6" in text
    assert "before training 1 chance 0.8" in text
    assert "phone probe 30.8 % accuracy, epoch 8" in text
    for section in SECTIONS:
        identity = section.lower().replace(" ", "-")
        assert identity in [a["id"] for a in read.named("section")]
        assert f"#{identity}" in [a["href"] for a in read.named("a")]


def test_each_prediction_step_has_a_line_and_a_column(tmp_path):
    logs = invented_logs(6)
    content = report_of(arguments(tmp_path), logs)
    read = Page(content)
    figure = content[content.index("Loss by prediction step") :]
    assert figure[: figure.index("</figure>")].count("<polyline") == 3
    assert read.row("validation loss")[1:] == [f"{v:.3f}" for v in logs["locLoss_val"][-1]]
    assert read.row("training accuracy")[1:] == [
        f"{100 * v:.1f} %" for v in logs["locAcc_train"][-1]
    ]
    alone = report_of(arguments(tmp_path), invented_logs(6, n_steps=1))
    assert "by prediction step" not in alone
    assert "by matched frame" in report_of(arguments(tmp_path), logs, step_name="matched frame")


def test_probes_stand_beside_the_majority_baseline(tmp_path):
    read = Page(report_of(arguments(tmp_path), invented_logs(9)))
    assert ["8 (best)", "30.8 %", "40.0 %", "12.5 %"] in read.rows
    assert "majority phone" in read.text
    assert "Speaker probe: phone error rate (%)" in read.text
    assert ["0 (best)", "50.0 %"] in read.rows


def test_stats_stand_together_and_numbered_values_share_a_chart(tmp_path):
    logs = {**invented_logs(11), "unclaimed_value": [1.0] * 11}
    content = report_of(arguments(tmp_path), logs, stats={"size_ctx_repr": tmp_path / "stats"})
    section = content[content.index('id="stats"') : content.index('id="capture"')]
    assert section.count("<figure") == 3  # mean, the parts, the value that nobody claims
    assert section.index("size_ctx_repr") < section.index("Other values")
    parts = section[section.index(">part<") :]
    assert parts[: parts.index("</figure>")].count("<polyline") == 3
    assert ">mean<" in section


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"supervised_classif_metric": False}, "This run has no probes"),
        ({"captureSetStats": None}, "This run has no stats"),
        ({"pathCaptureDS": None}, "This run captures nothing"),
        ({"pathCaptureSave": None}, "Only stats are computed"),
        ({}, "None so far: there is a capture every 5 epochs."),
    ],
)
def test_what_is_absent_is_said_with_the_reason(tmp_path, flags, words):
    logs = {key: values for key, values in invented_logs(2).items() if "_repr_" not in key}
    logs = {key: values for key, values in logs.items() if "_best_" not in key}
    assert words in Page(report_of(arguments(tmp_path, **flags), logs)).text


def test_flags_are_shown_as_given_and_only_those_that_differ(tmp_path):
    """1 is equal to True and 0 to False: numbers must stay numbers."""
    args = arguments(tmp_path, CPCCTC=True, load=["a b.pt", "c.pt"], file_extension="")
    read = Page(report_of(args, invented_logs(1)))
    assert read.row("--CPCCTCSkipBeg") == ["--CPCCTCSkipBeg", "1", "0"]
    assert read.row("--random_seed") == ["--random_seed", "1", "none"]
    assert read.row("--CPCCTC") == ["--CPCCTC", "yes", "no"]
    assert read.row("--load") == ["--load", "'a b.pt' c.pt", "none"]
    assert read.row("--file_extension") == ["--file_extension", "empty", ".flac"]
    assert not any(row[0] in ("--hiddenEncoder", "--device") for row in read.rows)


def test_a_run_that_was_just_begun_is_shown(tmp_path):
    """Even where an earlier one has left its record."""
    args = arguments(tmp_path)
    report_of(args, invented_logs(3), ["train.py", "old"])
    logs = {"epoch": [], "saveStep": 5, "before_training": invented_logs(1)["before_training"]}
    sets = [invented_set("training set")]
    report = RunReport(args, build_parser().parse_args([]), ["train.py", "new"], sets, machine="X1")
    report.write(logs)
    text = Page(Path(args.pathCheckpoint, REPORT).read_text()).text
    assert "0 of 40 epochs done." in text
    assert "validation loss 5.5 before training" in text
    assert "validation accuracy 1.0 % before training" in text
    assert text.count("No epoch is finished yet.") == 2
    assert "The run was started with: train.py new" in text
    assert "training set" in text
    assert "X1" in text
    assert "windows/s" not in text
    assert "train.py old" not in text
    report.write(invented_logs(1), speed(0, machine="X2"))
    text = Page(Path(args.pathCheckpoint, REPORT).read_text()).text
    assert "X2" in text
    assert "X1" not in text


def test_the_report_of_a_run_in_its_first_epoch_names_the_machine(
    tiny_corpus, tmp_path, monkeypatch, capsys
):
    def shown(*_):
        said.append(Page((tmp_path / REPORT).read_text()).text)
        raise UserError("that is all")

    said = []
    monkeypatch.setattr(train, "train_one_epoch", shown)
    flags = "--rnnMode linear --hiddenEncoder 8 --hiddenGar 8 --sizeWindow 3200".split()
    with ends_refused(capsys, "that is all"):
        train.main(["--pathDB", f"{tiny_corpus}/audio", "--pathCheckpoint", f"{tmp_path}", *flags])
    assert machine_in_words(device_from("auto")) in said[0]


def test_a_run_that_went_back_shows_no_later_speed(tmp_path):
    args = arguments(tmp_path)
    report_of(args, invented_logs(6))
    report = RunReport(args, build_parser().parse_args([]), ["train.py"], [])
    report.record.epochs[-1]["windows"] = 99999
    report.write(invented_logs(4))
    read = Page(Path(args.pathCheckpoint, REPORT).read_text())
    assert "4 of 40 epochs done" in read.text
    assert "windows/s 250" in read.text
    assert read.rows[-1][0] == "3 (best)"


def test_the_best_epoch_by_ctc_is_that_of_the_lowest_loss(tmp_path):
    """Its accuracies are zeros: they aren't shown."""
    logs = invented_logs(3)
    logs |= {"locLoss_val": [[3.0], [2.0], [4.0]], "locAcc_val": [[0.0]] * 3}
    logs |= {"locLoss_train": [[3.0]] * 3, "locAcc_train": [[0.0]] * 3}
    of_criterion = {"step_name": None, "has_accuracy": False}
    read = Page(report_of(arguments(tmp_path), logs, **of_criterion))
    assert [row[0] for row in read.rows[-3:]] == ["0", "1 (best)", "2"]
    assert "best 2, epoch 1" in read.text
    assert "validation accuracy" not in read.text


def test_the_corpus_is_counted_with_its_labels(tiny_corpus, tmp_path):
    corpus = scan_corpus(f"{tiny_corpus}/audio")
    lines = (tiny_corpus / "phones.txt").read_text().splitlines(keepends=True)
    (tmp_path / "some.txt").write_text("".join(lines[:6]))
    labels = read_phone_labels(tmp_path / "some.txt")
    whole = AudioDataset(corpus, corpus.utterances, 3200, title="training set")
    labelled = AudioDataset(
        corpus, corpus.utterances, 3200, phone_labels=labels, labelled_only=True, title="probe set"
    )
    content = report_of(
        arguments(tmp_path), invented_logs(1), sets=[whole, labelled], labels=labels
    )
    read = Page(content)
    hours = sum(s.samples for s in corpus.utterances) / 16000 / 3600
    assert read.row("training set") == [
        "training set", "9", f"{hours:.2f}", "3", str(whole.n_windows), "0.20 s",
        "6 of 9 files (66.7 %)",
    ]  # fmt: skip
    assert read.row("probe set")[1] == "6"
    assert read.row("probe set")[-1] == "6 of 9 files (66.7 %)"
    unlabelled = report_of(arguments(tmp_path), invented_logs(1), sets=[whole])
    assert Page(unlabelled).row("training set")[-1] == "-"


def test_a_long_run_shows_its_first_best_and_latest_epochs(tmp_path):
    logs = invented_logs(300)
    logs["locAcc_val"][77] = [0.99] * 3
    content = report_of(arguments(tmp_path), logs)
    assert len(content) < 600_000
    read = Page(content)
    table = read.rows[-(MAX_ROWS + 4) :]  # two rows of dots among them
    names = [row[0] for row in table]
    dots = "\N{MIDLINE HORIZONTAL ELLIPSIS}"
    assert names == ["0", dots, "77 (best)", dots, *map(str, range(288, 300))]
    assert "best 99.0 %, epoch 77" in read.text


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    """As in logs of other programs, or of a run that went astray."""
    logs = invented_logs(4)
    logs["locLoss_val"] = [[1.0, float("nan")], None, "text", [2.0]]
    logs["locAcc_val"] = [None] * 4
    logs["gradNorm_train"] = [float("inf"), True, 1.0]
    logs["learningRate"] = "none"
    logs["before_training"] = None
    logs["phone_best_val_acc"] = [[]] * 4
    logs["odd"] = [{"a": 1}] * 4
    del logs["locLoss_train"]
    content = report_of(arguments(tmp_path), logs)
    assert "nan" not in content[content.index("<body") :]
    read = Page(content)
    assert "validation loss 2 best 2, epoch 3" in read.text
    assert "validation accuracy" not in read.text.split("Training", 2)[1]


def test_nothing_in_the_page_is_taken_from_names(tmp_path):
    args = arguments(tmp_path, pathDB=HOSTILE, pathTrain="\udcff" + HOSTILE)
    args.pathCheckpoint = str(tmp_path / HOSTILE.replace("/", "%"))
    logs = {**invented_logs(2), HOSTILE: [1.0, 2.0]}
    sets = [invented_set(HOSTILE)]
    content = report_of(args, logs, ["train.py", HOSTILE], sets, stats={HOSTILE: tmp_path})
    read = Page(content)
    names = {name for name, _ in read.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    assert [a["src"] for a in read.named("img")] == []
    assert HOSTILE in "".join(read.texts)
    (policy,) = [a["content"] for a in read.named("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


# ------------------------------------------------------------------------------------- its pictures


def write_pictures(args, directory):
    """Pictures of probes and stats at several epochs, and a capture; content by file name."""
    contents = {}
    for epoch, color in ((4, "red"), (8, "blue"), (12, "green")):
        path = Path(args.linsep_logs_dir, str(epoch), "phone", "confusion.png")
        contents[f"probe {epoch}"] = draw_picture(path, color)
    for epoch, color in ((0, "red"), (10, "orange"), (15, "black")):
        path = directory / "stats" / f"size_ctx_repr_{epoch}.png"
        contents[f"stat {epoch}"] = draw_picture(path, color)
    return contents


def embedded(content):
    sources = [a["src"] for a in Page(content).named("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2]) for source in sources]


def test_the_latest_pictures_of_this_run_are_in_the_page(tmp_path):
    """Not those that an earlier run has left under epochs that are still to come."""
    args = arguments(tmp_path)
    contents = write_pictures(args, tmp_path)
    found = embedded(
        report_of(args, invented_logs(11), stats={"size_ctx_repr": tmp_path / "stats"})
    )
    assert found == [contents["probe 8"], contents["stat 10"]]


def test_pictures_that_are_too_large_or_broken_are_named(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    contents = write_pictures(args, tmp_path)
    stats = {"size_ctx_repr": tmp_path / "stats"}
    largest = max(map(len, contents.values()))
    monkeypatch.setattr(pictures, "LARGEST_TOTAL", largest + 1)
    content = report_of(args, invented_logs(11), stats=stats)
    assert embedded(content) == [contents["probe 8"]]
    assert "Too large for this page." in content
    assert str(tmp_path / "stats" / "size_ctx_repr_10.png") in content
    Path(args.linsep_logs_dir, "8", "phone", "confusion.png").write_bytes(b"torn")
    content = report_of(args, invented_logs(11), stats=stats)
    assert embedded(content) == [contents["stat 10"]]
    assert "Not a PNG file." in content


def test_a_capture_is_drawn_when_it_is_made_and_shown_until_the_next(tmp_path):
    args = arguments(tmp_path)
    capture = Path(args.pathCaptureSave, "10")
    write_capture(capture)
    drawn = [capture / "pictures" / f"window_{i:05d}.png" for i in range(pictures.MAX_WINDOWS)]
    before = report_of(args, invented_logs(13))
    assert embedded(before) == []  # epoch 12 draws nothing of epoch 10
    assert "It has no pictures" in before
    at_it = embedded(report_of(args, invented_logs(11)))
    assert at_it == [path.read_bytes() for path in drawn]
    assert embedded(report_of(args, invented_logs(13))) == at_it
    assert sorted(capture.glob("pictures/*")) == drawn


def test_a_capture_is_drawn_with_a_report_that_was_put_off(tmp_path):
    args = arguments(tmp_path)
    write_capture(Path(args.pathCaptureSave, "10"))
    report = RunReport(args, build_parser().parse_args([]), ["train.py"], [])
    for n_epochs in range(1, 12):
        report.put_off(invented_logs(n_epochs), speed(n_epochs - 1))
    assert not report.covers(10)
    report.write(invented_logs(13), speed(12))
    assert report.covers(12)
    assert len(embedded(Path(args.pathCheckpoint, REPORT).read_text())) == pictures.MAX_WINDOWS


def test_a_capture_that_cannot_be_drawn_costs_nothing_but_its_pictures(tmp_path, capsys):
    args = arguments(tmp_path)
    Path(args.pathCaptureSave, "5").mkdir(parents=True)
    content = report_of(args, invented_logs(6))
    assert "It has no pictures" in content
    assert "note: no pictures of the capture" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- its record


def test_a_resumed_run_keeps_its_speed_and_its_commands(tmp_path):
    args, logs = arguments(tmp_path), invented_logs(6)
    report_of(args, logs, ["train.py", "--nEpoch", "6"])
    later = RunReport(args, build_parser().parse_args([]), ["train.py", "a b"], [])
    later.write({key: v[:4] if isinstance(v, list) else v for key, v in logs.items()}, speed(3))
    content = json.loads(Path(args.pathCheckpoint, RECORD).read_text())
    assert [row["epoch"] for row in content["epochs"]] == [0, 1, 2, 3]
    assert content["calls"] == [
        {"epoch": 0, "command": "train.py --nEpoch 6"},
        {"epoch": 3, "command": "train.py 'a b'"},
    ]
    text = Page(Path(args.pathCheckpoint, REPORT).read_text()).text
    assert "The run was started with: train.py --nEpoch 6 From epoch 3: train.py 'a b'" in text


@pytest.mark.parametrize(
    "content",
    ["", "{torn", "[]", "null", '{"epochs": 3, "calls": {"epoch": 1}}',
     '{"epochs": [1, {"epoch": "x"}, {"epoch": true, "machine": "m"}], "calls": [{"epoch": 2}]}'],
)  # fmt: skip
def test_a_damaged_record_is_begun_anew(tmp_path, content):
    args = arguments(tmp_path)
    Path(args.pathCheckpoint).mkdir()
    Path(args.pathCheckpoint, RECORD).write_text(content)
    record = RunRecord(args.pathCheckpoint)
    assert (record.epochs, record.calls) == ([], [])
    assert "1 of 40 epochs done" in report_of(args, invented_logs(1))
    assert len(RunRecord(args.pathCheckpoint).epochs) == 1


def test_odd_values_in_a_record_are_left_out_of_the_page(tmp_path):
    args = arguments(tmp_path)
    Path(args.pathCheckpoint).mkdir()
    row = {"epoch": 0, "machine": "CPU", "seconds": "x", "windows": None, "finished": []}
    content = {"epochs": [row], "calls": [{"epoch": 0, "command": HOSTILE}]}
    Path(args.pathCheckpoint, RECORD).write_text(json.dumps(content))
    report = RunReport(args, build_parser().parse_args([]), ["train.py"], [])
    report.write(invented_logs(2), speed(1))
    read = Page(Path(args.pathCheckpoint, REPORT).read_text())
    assert HOSTILE in "".join(read.texts)
    assert "windows/s 250" in read.text


def test_a_failed_write_leaves_the_earlier_page(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    before = report_of(args, invented_logs(2))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        report_of(args, invented_logs(3))
    monkeypatch.undo()
    assert Path(args.pathCheckpoint, REPORT).read_text(encoding="utf-8") == before
    assert {p.name for p in Path(args.pathCheckpoint).iterdir()} == {REPORT, RECORD}


def test_the_speed_of_an_epoch_is_that_of_its_clock():
    clock = SimpleNamespace(started=10.0, stopped=14.0, waited=1.0, windows=100)
    values = epoch_speed(clock, torch.device("cpu"))
    assert (values["seconds"], values["windows"], values["waited"]) == (4.0, 100, 1.0)
    assert values["gpu_memory"] is None
    assert 2**25 < values["memory"] < 2**45  # bytes, not kilobytes
    assert "PyTorch" in values["machine"]
    several = epoch_speed(clock, torch.device("cpu"), processes=2)
    assert several["machine"] == f"2 processes, each with {values['machine']}"
    assert json.loads(json.dumps(values)) == values


# -------------------------------------------------------------------------------- markup and charts


def test_foreign_text_never_becomes_markup():
    made = str(tag("p", HOSTILE, tag("b", 3), None, title=HOSTILE, class_="x", lang=None))
    read = Page(made)
    assert read.tags == [("p", {"title": HOSTILE, "class": "x"}), ("b", {})]
    assert "".join(read.texts) == HOSTILE + "3"
    assert join(Markup("<hr>"), "<hr>") == "<hr>&lt;hr&gt;"


def test_what_utf8_and_html_cannot_hold_is_replaced():
    name = b"caf\xe9\x00\x1b[31m.flac".decode("utf-8", "surrogateescape")
    assert printable(name).encode() == "caf?\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}" \
        "[31m.flac".encode()  # fmt: skip
    assert printable("two\nlines\t\u0142") == "two\nlines\t\u0142"


def coordinates(drawing):
    """The points of each line of a drawing."""
    lines = [a["points"] for name, a in Page(str(drawing)).tags if name == "polyline"]
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_a_line_rises_to_the_right_within_its_picture():
    (points,) = coordinates(draw_lines("x", [Line("a", [(0, 1.0), (1, 2.0), (3, 4.0)], "other")]))
    xs, ys = zip(*points, strict=True)
    assert xs[0] == line_chart.LEFT
    assert xs[-1] == line_chart.WIDTH - line_chart.RIGHT
    assert (xs[1] - xs[0]) * 2 == pytest.approx(xs[2] - xs[1], abs=0.2)  # epochs to scale
    assert ys[0] > ys[1] > ys[2] > line_chart.TOP
    assert ys[0] < line_chart.HEIGHT - line_chart.BOTTOM


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0, -1.0], [1e-9, 2e-9], [1e20, 3]])
def test_any_values_give_a_drawing_with_finite_coordinates(values):
    lines = [Line("a", list(enumerate(values)), "other")]
    for from_zero in (False, True):
        drawing = draw_lines("x", lines, [Level("level", 1.0)], from_zero)
        assert "nan" not in drawing
        assert "inf" not in drawing
        for x, y in coordinates(drawing)[0]:
            assert 0 <= x <= line_chart.WIDTH
            assert 0 <= y <= line_chart.HEIGHT
        assert len(Page(str(drawing)).named("circle")) == len(values)  # seen even if alone


def test_a_long_line_is_thinned_out_and_keeps_its_peaks():
    points = [(epoch, float(np.sin(epoch / 50))) for epoch in range(5000)]
    points[1234] = (1234, 99.0)
    points[4321] = (4321, -99.0)
    kept = thinned(points)
    assert len(kept) <= 2 * line_chart.MAX_BUCKETS
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    assert {points[1234], points[4321]} <= set(kept)
    drawing = draw_lines("x", [Line("a", points, "other")])
    assert len(drawing) < 40_000
    assert not Page(str(drawing)).named("circle")
    assert thinned(points[:100]) == points[:100]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.31, 2.35), (-3, 7), (0, 0.00021), (99.99, 100.01), (0, 4e5)]
)
def test_ticks_are_few_round_and_in_range(low, high):
    found, step = ticks(low, high, 4)
    assert 2 <= len(found) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    digits = f"{step:.12e}"[0]
    assert digits in "125"
    whole, _ = ticks(0, 2, 6, whole=True)
    assert whole == [0, 1, 2]


def test_labels_of_near_values_differ():
    drawing = draw_lines("x", [Line("a", [(0, 100.001), (1, 100.002)], "other")])
    labels = [a for a in re.findall(r'class="tick value">([^<]+)<', drawing) if a != "epoch"]
    assert len(labels) == len(set(labels)) >= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "0.0002"), (2e-5, "2e-5"), (0.002, "0.002"), (0, "0"), (-1.0, "-1"), (40.0, "40"),
     (1234.5, "1,234"), (2.5e7, "2.5e7"), (1e-30, "1e-30"), (3.14159, "3.142")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert line_chart.readable(value) == text


def test_the_pointer_is_told_the_values_of_an_epoch():
    lines = [Line("a", [(0, 1.0), (2, 2.5)], "training"), Line("b", [(2, 3.0)], "validation")]
    told = re.findall(r"<title>(.*?)</title>", draw_lines("x", lines), re.DOTALL)
    assert told == ["epoch 0\na: 1", "epoch 2\na: 2.5\nb: 3"]


# ------------------------------------------------------------------------------------- in a browser

# What a browser makes of the page. Only a copy without the page's policy runs this, in a frame
# as wide as wanted: windows can't be made narrower than some 500 pixels.
MEASURE = """
<script>
const box = element => element.getBoundingClientRect();
const all = name => [...document.querySelectorAll(name)];
const found = {
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - innerWidth,
  sections: all("section").filter(s => box(s).height > 30)
    .map(s => s.querySelector("h2").innerText),
  pictures: all("img").map(i => i.complete && i.naturalWidth > 0 && box(i).width > 50),
  charts: all(".chart > svg").map(s => box(s).width > 200 && box(s).height > 100),
  outside: all(".chart > svg").flatMap(s => [...s.querySelectorAll("polyline, circle, text")]
    .filter(m => box(m).left < box(s).left - 1 || box(m).right > box(s).right + 1
              || box(m).top < box(s).top - 2 || box(m).bottom > box(s).bottom + 2)
    .map(m => s.getAttribute("aria-label") + " " + m.outerHTML)),
  fetched: performance.getEntriesByType("resource").map(r => r.name.slice(0, 99))
    .filter(name => !name.startsWith("data:")),
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector("h1")).color,
};
parent.document.documentElement.setAttribute("data-found", JSON.stringify(found));
</script>
"""


def browse(path, profile, *words):
    """Open a page in a browser of its own; what it prints."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
        "--hide-scrollbars"
    ).split()
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", *words, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    """A report with everything in it, and a hostile name."""
    directory = tmp_path_factory.mktemp("report")
    args = arguments(directory, pathDB=HOSTILE)
    write_pictures(args, directory)
    write_capture(Path(args.pathCaptureSave, "10"))
    stats = {"size_ctx_repr": directory / "stats"}
    report_of(args, invented_logs(11), ["python", "train.py", HOSTILE], stats=stats)
    return Path(args.pathCheckpoint, REPORT)


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_browser_shows_everything_at_any_width_and_in_both_schemes(
    whole_report, tmp_path, width, scheme
):
    content = whole_report.read_text(encoding="utf-8")
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", content)
    assert free != content
    framed = html.escape(free.replace("</body>", MEASURE + "</body>"))
    harness = tmp_path / "harness.html"
    harness.write_text(f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{framed}">')
    setting = f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}"
    dom = browse(harness, tmp_path / "a", "--window-size=1400,1000", setting, "--dump-dom")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found["width"] == width
    assert found["overflow"] <= 0  # nothing sticks out to the right
    assert found["sections"] == list(SECTIONS)
    assert len(found["pictures"]) == 4  # confusions, a stat, two windows of a capture
    assert all(found["pictures"])
    assert len(found["charts"]) >= 12
    assert all(found["charts"])
    assert found["outside"] == []
    assert found["fetched"] == []
    brightness = [sum(map(int, re.findall(r"\d+", found[k])[:3])) / 765 for k in ("page", "ink")]
    assert (brightness[0] > 0.9 > 0.2 > brightness[1]) == (scheme == "light")
    assert (brightness[0] < 0.2 < 0.9 < brightness[1]) == (scheme == "dark")


@needs_chromium
def test_a_browser_runs_nothing_that_a_name_smuggles_in(whole_report, tmp_path):
    """The page as it is; and a script that did get in would be stopped by its policy."""
    dom = browse(whole_report, tmp_path / "a", "--dump-dom")
    assert "<title>run: report of a CPC run</title>" in dom
    broken = tmp_path / "broken.html"
    script = "<script>document.title='taken'</script></body>"
    content = whole_report.read_text(encoding="utf-8")
    broken.write_text(content.replace("</body>", script), encoding="utf-8")
    assert "<title>run: report of a CPC run</title>" in browse(broken, tmp_path / "b", "--dump-dom")


# --------------------------------------------------------------------------------- the summary


def test_a_summary_lists_the_pictures_of_its_run_alone(reported_run, tmp_path, capsys):
    place = reported_run.parent.parent
    other = place / "other"
    for directory in (other, other / "0" / "phone", tmp_path):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "picture.png").touch()
    summary.main([str(reported_run.parent), "--pictures", str(tmp_path)])
    said = capsys.readouterr().out
    listed = {Path(line.strip()) for line in said.splitlines() if line.endswith(".png")}
    pictures = {path for path in place.rglob("*.png") if not path.is_relative_to(other)}
    kinds = {path.relative_to(place).parts[0] for path in pictures}
    assert kinds >= {"probes", "captures", "stats"}
    assert listed == {*pictures, tmp_path / "picture.png"}


def test_a_summary_compares_with_random_weights_alone(reported_run, tmp_path, capsys):
    flags = {"pathPhone": None, "no_pretraining": False}
    save_json(tmp_path / "checkpoint_args.json", flags)
    save_json(tmp_path / "checkpoint_logs.json", {"locAcc_val": [[0.25], [0.125]]})
    words = [str(reported_run.parent), "--untrained", str(tmp_path)]
    with ends_refused(capsys, "isn't a probe of random weights.*--no_pretraining"):
        summary.main(words)
    save_json(tmp_path / "checkpoint_args.json", {**flags, "no_pretraining": True})
    summary.main(words)
    assert re.search(r"speaker accuracy of a linear probe +25\.0 %", capsys.readouterr().out)


@pytest.mark.parametrize(("by_ctc", "shown"), [(False, True), (True, False)])
def test_a_summary_has_accuracies_only_where_they_mean_anything(by_ctc, shown, tmp_path, capsys):
    args = arguments(tmp_path, supervised=True, CTC=by_ctc)
    save_json(tmp_path / "checkpoint_args.json", vars(args))
    units = {"units_pnmi": [None, 0.25, 0.5], "units_bitrate_frames": [None, 500.0, None]}
    save_json(tmp_path / "checkpoint_logs.json", invented_logs(3) | units)
    summary.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"validation loss +5\.500 +3\.767\n", said)
    assert re.search(r"PNMI of discrete units +- +0\.500\nbitrate .* +- +500\n", said)
    assert ("validation accuracy" in said) == shown
    assert "phone accuracy of a linear probe" in said


def test_a_summary_of_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "model.pt").touch()
    for place in (tmp_path / "missing", tmp_path, tmp_path / "model.pt"):
        with ends_refused(capsys, f"{place}: there is no run in it.*give its --pathCheckpoint"):
            summary.main([str(place)])
    for name in "ba":
        save_json(tmp_path / name / "checkpoint_args.json", {})
    with ends_refused(capsys, f"no run in it.*one below it: {tmp_path}/a, {tmp_path}/b$"):
        summary.main([str(tmp_path)])


# ------------------------------------------------------------------------------ the comparison


def write_run(directory, n_epochs, **flags):
    """A run without a record, as one of the original is."""
    args = arguments(directory, **flags)
    save_json(directory / "checkpoint_args.json", vars(args))
    nearest = {
        "phone_knn_10_val_acc": [0.25] * n_epochs,
        "phone_best_val_acc_std": [0.01] * n_epochs,
        "locLoss_val_segments": [[2.0, 1.0]] * n_epochs,
    }
    save_json(directory / "checkpoint_logs.json", invented_logs(n_epochs) | nearest)
    return directory


def test_a_comparison_holds_runs_of_every_kind(reported_run, tmp_path, capsys):
    """A run of this program, one that is still training, one of the original."""
    training = write_run(tmp_path / "b", 9, CPCCTC=True)
    runs = [str(reported_run.parent), str(training), str(COMPACT_GOLDEN / "checkpoint")]
    compare.main([*runs, "--out", str(tmp_path / "page.html")])
    printed = {
        line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()
    }
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(content)
    assert printed["epochs"] == "2 of 2 9 of 40 1 of 1".split()
    loss = float(np.mean(invented_logs(9)["locLoss_val"][-1]))
    assert page.row("validation loss")[2] == f"{loss:.3f} (8)"
    assert page.row("loss of segments")[1:] == ["-", "1.500 (8)", "-"]
    assert not any(row and row[0].startswith("locLoss") for row in page.rows)
    assert page.row("phone probe: accuracy")[2:] == ["30.8 % (8)", "-"]
    assert page.row("phone, 10 nearest: accuracy")[1:] == ["-", "25.0 % (8)", "-"]
    assert page.row("  standard deviation")[1:] == ["-", "1.0 %", "-"]
    assert printed["validation loss"][2:4] == [f"{loss:.3f}", "(8)"]
    assert page.row("training time")[2:] == ["-", "-"]
    assert page.row("--CPCCTC")[1:] == ["no", "yes", "yes"]
    assert page.row("--initialisation")[1:] == ["lecun", "lecun", "original"]
    assert not any(row and row[0] in ("--normMode", "--pathCheckpoint") for row in page.rows)
    assert "The criteria differ" in page.text
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _ in page.tags)
    assert "onerror" not in [name for _, attributes in page.tags for name in attributes]


def test_a_comparison_draws_each_run_to_its_own_end(tmp_path):
    runs = [write_run(tmp_path / str(n), n) for n in (3, 9)]
    compare.main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    chart = content[content.index("Validation loss</figcaption>") :]
    lines = re.findall(
        r'<polyline points="([^"]*)" class="(run\d)"', chart[: chart.index("</figure>")]
    )
    ends = [float(points.split()[-1].partition(",")[0]) for points, _ in lines]
    axes = line_chart.Axes(0, 8, 0, 1)
    assert [name for _, name in lines] == ["run0", "run1"]
    assert ends == [axes.x(2), axes.x(8)]


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    run = str(write_run(tmp_path / "run", 3))
    (tmp_path / "empty").mkdir()
    save_json(write_run(tmp_path / "damaged", 3) / "checkpoint_logs.json", {"epoch": "3"})
    for words, said in (
        ([run], "two or more different runs"),
        ([run, f"{run}/../run"], "two or more different runs"),
        ([run, str(tmp_path / "empty")], "empty: there is no run in it"),
        ([run, str(tmp_path / "none")], "none: there is no run in it"),
        ([run, str(tmp_path / "damaged")], "damaged: its checkpoint_args.json or .*is damaged"),
    ):
        with ends_refused(capsys, said):
            compare.main([*words, "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()
