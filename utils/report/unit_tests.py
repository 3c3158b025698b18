"""Tests of the pictures: what is in them, from captures whose content is known."""

import html.parser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

import train
from utils.capture import CaptureReader, CaptureWriter
from utils.files import save_json
from utils.misc import SAMPLE_RATE
from utils.report import plot_capture, summary
from utils.report.page import REPORT
from utils.report.run_record import RunRecord
from utils.testing import ends_refused

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
    assert len(axes_of(figure)) == 1 + 2 + 1 + plot_capture.POSITIONS


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
    matrices = axes_of(panels(capture, position=27))[-plot_capture.POSITIONS :]
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


def test_missing_audio_is_said_or_refused(tmp_path, capsys):
    capture = write_capture(tmp_path / "3", ["phone_align"], pathDB=tmp_path / "gone")
    plot_capture.main([str(capture), "--windows", "0"])
    assert "gone/7/a.wav: No such file or directory; drawn without audio" in capsys.readouterr().out
    with ends_refused(capsys, r"elsewhere/7/a\.wav: No such file"):
        plot_capture.main([str(capture), "--pathDB", str(tmp_path / "elsewhere")])
    (capture / "index.json").unlink()
    plot_capture.main([str(capture), "--windows", "0"])
    with ends_refused(capsys, r"has no index\.json, so no audio"):
        plot_capture.main([str(capture), "--pathDB", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--windows", "4"], "no window 4 .* has 0 to 3"),
        (["--position", "51"], "--position 51: must be 0 to 50"),
        (["--position", "-1"], "--position -1: must be"),
        (["--phones", "none.txt"], r"none\.txt: can't be read"),
        (["--out", "/dev/null/x"], "/dev/null/x: pictures can't be written.*--out"),
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


# ---------------------------------------------------------------------------------- the report

SECTIONS = ("Training", "Probes", "Stats", "Capture", "Corpus", "Speed and memory")


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


class Page(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_report_holds_the_whole_run_and_needs_no_network(reported_run):
    content = reported_run.read_text(encoding="utf-8")
    page = Page(content)
    text = " ".join(page.text)
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


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here (Debian's package)")
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


def test_the_record_of_a_run_survives_and_is_begun_anew_when_damaged(tmp_path):
    record = RunRecord(tmp_path)
    speed = {"seconds": 2.0, "windows": 10, "machine": "CPU"}
    for epoch in (0, 1, 2):
        record.add(epoch, speed, "train.py")
    record.save()
    again = RunRecord(tmp_path)
    again.add(1, speed, "train.py --nEpoch 9")  # the run went back to epoch 1
    assert [row["epoch"] for row in again.epochs] == [0, 1]
    assert [call["epoch"] for call in again.calls] == [0, 1]
    record.path.write_text("{torn")
    assert RunRecord(tmp_path).epochs == []


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
    assert re.search(r"speakers told apart by a linear probe +25\.0 %", capsys.readouterr().out)
