"""Tests of augmentation: effects on audio, what is drawn for a batch, and its way through a run."""

import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import train
from augmentation import Augmentation, Draws
from criterion import build_criterion
from criterion.networks import Networks
from dataset import AudioDataset, Batch, BatchLoader
from eval import hear_augmentation
from model import build_model
from tests.helpers import REAL_SPEECH, assert_close, ends_refused, needs_real_speech
from tests.test_train import (
    EXAMPLE,
    SMALL,
    assert_same,
    checkpoint,
    on,
    run,
    signal_in_step,
    trained,
)
from utils.data import effects
from utils.data.corpus import scan_corpus
from utils.data.windows import Layout
from utils.misc import SAMPLE_RATE, Position
from utils.run.distributed import World
from utils.run.flags import AUGMENT_TYPES, build_parser
from utils.run.rules import complete

LENGTH = 20480
CHAIN = "--room_scale_max 2 --augment_past --augment_type pitch additive reverb".split()


def full(value, n=1):
    return torch.full((n,), float(value))


def tone(frequency, n=LENGTH):
    return torch.sin(2 * math.pi * frequency * torch.arange(n) / SAMPLE_RATE)[None]


# ----------------------------------------------------------------------------------------- effects


def freeverb(room, n):
    """The impulse response of SoX's reverb, sample by sample."""
    scale, slope = 0.1 + 0.9 * room / 100, -1 / math.log(0.7)
    offset = 100 / (1 + slope * math.log(0.02))
    feedback, damping = 1 - math.exp((50 - offset) / (slope * offset)), 0.2 + 0.3 * 0.5
    combs, all_passes = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617), (225, 341, 441, 556)
    total = np.zeros(n)
    for spread in (0, 12):
        lengths = [d + spread * (1, -1)[i % 2] for i, d in enumerate(combs + all_passes)]
        source, wave = [0.015] + [0.0] * (n - 1), [0.0] * n
        for length in lengths[:8]:
            line, store = [0.0] * round(scale * length * 16000 / 44100), 0.0
            for t in range(n):
                delayed = line[t % len(line)]
                store = delayed + (store - delayed) * damping
                line[t % len(line)] = source[t] + store * feedback
                wave[t] += delayed
        for length in lengths[8:]:
            line = [0.0] * round(length * 16000 / 44100)
            for t in range(n):
                delayed = line[t % len(line)]
                line[t % len(line)] = wave[t] + 0.5 * delayed
                wave[t] = delayed - wave[t]
        total += np.array(wave) / 2
    total[0] += 1
    return total


@pytest.mark.parametrize("room", [0, 37, 100])
def test_room_response_is_that_of_the_recursion(room):
    assert_close(effects.room_response(room, 8000), freeverb(room, 8000), 1e-7)
    tail = effects.room_response(room, 2**15)[20000:]
    assert tail.abs().max() < 1e-3


def test_reverberation_is_a_convolution_row_by_row():
    waveform, responses = torch.randn(2, 3, 500)
    convolved = [np.convolve(*rows)[:500] for rows in zip(waveform, responses, strict=True)]
    assert_close(effects.reverberate(waveform, responses), np.stack(convolved))
    impulse = F.one_hot(torch.tensor([0]), 500).float()
    assert_close(effects.reverberate(waveform[:1], impulse), waveform[:1])


def test_recorded_response_begins_with_its_direct_path():
    recorded = torch.tensor([0.0, 0.01, -0.5, 0.25, 0.1])
    assert_close(effects.from_direct_path(recorded), [1, -0.5, -0.2])
    assert effects.from_direct_path(torch.zeros(5)).tolist() == [1]


@pytest.mark.parametrize("cents", [-300, -200, -100, 100, 200, 300])
def test_pitch_of_a_harmonic_tone(cents):
    harmonics = sum(tone(150 * k) / k for k in range(1, 11)) / 10
    shifted = effects.shift_pitch(harmonics, torch.tensor([cents]), 300)
    spectrum = torch.fft.rfft(shifted[0] * torch.hann_window(LENGTH), 2**20).abs()
    target = 150 * 2 ** (cents / 1200)
    lowest = int(0.9 * target * 2**20 / SAMPLE_RATE)
    peak = lowest + spectrum[lowest : int(lowest * 1.2)].argmax()
    assert abs(1200 * math.log2(peak / 2**20 * SAMPLE_RATE / target)) < 10
    level = 10 * torch.log10(shifted.square().mean() / harmonics.square().mean())
    assert abs(level) < 0.5


@pytest.fixture(scope="module")
def speech():
    """(B, LENGTH), windows of real speech."""
    rows = []
    for path in sorted((REAL_SPEECH / "audio").rglob("*.flac")):
        audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        rows += [*audio.unfold(0, LENGTH, LENGTH)[:2]]
    return torch.stack(rows)


def pitch_track(waveform, size=640, shortest=36, longest=250):
    """Pitch in Hz and how periodic the audio is, (B, frames) each, by autocorrelation."""
    low = effects.only_band(waveform, full(-500, len(waveform)), full(900, len(waveform)))
    frames, n = low.unfold(1, size + longest, 160), 2048
    spectra = torch.fft.rfft(frames, n) * torch.fft.rfft(frames[..., :size], n).conj()
    products = torch.fft.irfft(spectra, n)[..., : longest + 1]
    energy = F.avg_pool1d(frames.square().flatten(0, 1)[:, None], size, 1) * size
    energy = energy.view_as(products)
    similarity = products / (energy * energy[..., :1]).sqrt().clamp(min=1e-9)
    lags = similarity[..., shortest:longest]
    best = lags.amax(2, keepdim=True)
    is_peak = lags == F.max_pool1d(lags.flatten(0, 1)[:, None], 5, 1, 2).view_as(lags)
    lag = shortest + (is_peak & (lags > 0.9 * best)).float().argmax(2)
    a, b, c = (similarity.gather(2, (lag + shift)[..., None])[..., 0] for shift in (-1, 0, 1))
    vertex = ((a - c) / 2 / (a - 2 * b + c).clamp(max=-1e-9)).clamp(-1, 1)
    is_loud = frames[..., :size].square().mean(2) > 1e-5
    return SAMPLE_RATE / (lag + vertex), best.squeeze(2) * is_loud


def envelope(waveform):
    energy = F.conv1d(waveform.square()[:, None], torch.hann_window(161)[None, None], padding=80)
    return energy.squeeze(1).sqrt() - energy.squeeze(1).sqrt().mean(1, keepdim=True)


@needs_real_speech
@pytest.mark.parametrize("cents", [-300, -100, 300])
def test_pitch_and_timing_of_speech(cents, speech):
    shifted = effects.shift_pitch(speech, torch.full((len(speech),), cents), 300)
    (before, periodic), (after, _) = pitch_track(speech), pitch_track(shifted)
    error = (1200 * torch.log2(after / before) - cents)[periodic > 0.9]
    assert len(error) > 300
    assert (error.abs() < 40).float().mean() > 0.8
    spectra = (
        torch.fft.rfft(envelope(shifted), 2**16) * torch.fft.rfft(envelope(speech), 2**16).conj()
    )
    correlation = torch.fft.irfft(spectra).roll(800, 1)[:, :1601]
    lags = (correlation.argmax(1) - 800) / 16
    assert abs(lags.mean()) < 1  # ms


@pytest.mark.parametrize("snr", [-5.0, 12.5])
def test_noise_has_the_ratio_asked_for(snr):
    waveform = torch.randn(3, LENGTH) * torch.tensor([[0.003], [0.1], [1]])
    noise = torch.randn(3, LENGTH) * 7
    for band in ((), (full(80, 3), full(240, 3))):
        added = effects.add_noise(waveform, noise, full(snr, 3), *band) - waveform
        ratio = 10 * torch.log10(waveform.square().mean(1) / added.square().mean(1))
        assert_close(ratio, full(snr, 3), 0.1 / abs(snr))
    power = torch.fft.rfft(added).abs().square()
    inside = power[:, int(30 * LENGTH / SAMPLE_RATE) : int(300 * LENGTH / SAMPLE_RATE)]
    assert (inside.sum(1) > 0.99 * power.sum(1)).all()


def test_rejected_band_is_gone_and_the_rest_is_as_it_was():
    inside, outside = tone(1000), tone(2000)
    left = effects.reject_band(inside + outside, full(700), full(1300))
    middle = slice(2000, -2000)  # the tones' own ends have other frequencies
    assert_close(left[:, middle], outside[:, middle], 1e-2)


def test_colours_of_noise():
    noise = effects.coloured(torch.randn(2, 2**18), torch.tensor([0.0, 2.0]))
    power = torch.fft.rfft(noise).abs().square()
    bands = [power[:, int(f * 2**14) : int(f * 2**15)].mean(1) for f in (1 / 4, 1)]
    assert_close((bands[0] / bands[1]).log2(), [0, 4], 0.05)


def test_dropout_silences_the_given_samples():
    gaps = torch.tensor([0, 7, 90]), torch.tensor([3, 0, 10])
    silent = effects.drop_out(torch.ones(3, 100), *gaps) == 0
    assert [row.nonzero().flatten().tolist() for row in silent] == [
        [0, 1, 2],
        [],
        [*range(90, 100)],
    ]


def test_neutral_parameters_leave_the_waveform_as_it_is():
    waveform, zeros = torch.randn(2, LENGTH), torch.zeros(2)
    assert torch.equal(effects.shift_pitch(waveform, zeros, 300), waveform)
    assert torch.equal(effects.reject_band(waveform, full(500, 2), full(500, 2)), waveform)
    assert torch.equal(effects.drop_out(waveform, full(30, 2), zeros), waveform)


@pytest.mark.parametrize("audio", ["silence", "clicks", "full scale", "constant"])
def test_effects_are_finite_on_any_audio(audio):
    waveform = torch.zeros(2, LENGTH)
    if audio == "clicks":
        waveform[:, ::3000] = 1
    elif audio == "full scale":
        waveform = torch.sign(torch.randn(2, LENGTH))
    elif audio == "constant":
        waveform += 0.9
    drawn = torch.tensor([-300, 170])
    results = [
        effects.shift_pitch(waveform, drawn, 300),
        effects.add_noise(waveform, torch.randn(2, LENGTH), full(5, 2)),
        effects.add_noise(torch.randn(2, LENGTH), waveform, full(5, 2), full(80, 2), full(240, 2)),
        effects.reverberate(waveform, torch.randn(2, LENGTH)),
        effects.reject_band(waveform, full(100, 2), full(300, 2)),
    ]
    assert all(result.isfinite().all() and result.shape == waveform.shape for result in results)
    if audio == "silence":
        assert not results[0].any()
        assert not results[1].any()


# ------------------------------------------------------------------------------------------- draws


def parsed(*words):
    return build_parser().parse_args([*SMALL, *map(str, words)])


def epoch_of(corpus, *words, rank=0, size=1):
    """Position -> Batch, ready for use, of an epoch that is augmented as these flags say."""
    corpus = scan_corpus(corpus / "audio")
    audio = AudioDataset(corpus, corpus.utterances, 3200)
    augmentation = Augmentation(parsed(*words), audio.speakers) if words else None
    options = {"seed": 5, "training": True, "world": World(rank, size)}
    loader = BatchLoader(audio, 4, "samespeaker", augmentation=augmentation, **options)
    return {position: batch.to("cpu") for position, batch in loader.epoch(1)}


def differ(one, other):
    """(B,), whether rows differ."""
    return (one != other).flatten(1).any(1)


def test_any_number_of_processes_draws_the_same_and_nothing_from_the_global_generators(tiny_corpus):
    words = [*CHAIN, "time_dropout", "bandreject", "--augment_future"]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    alone = epoch_of(tiny_corpus, *words)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    shares = [epoch_of(tiny_corpus, *words, rank=rank, size=2) for rank in range(2)]
    assert len(shares[0]) + len(shares[1]) > 10
    for share in shares:
        for position, batch in share.items():
            assert torch.equal(batch.waveform, alone[position].waveform)
            assert torch.equal(batch.past, alone[position].past)


def test_every_position_and_side_has_its_own_draws():
    args = parsed("--augment_past", "--augment_future", "--augment_type", "pitch")
    places = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    drawn = set()
    for seed in (3, 4):
        args.random_seed = seed
        for place in places:
            found = Augmentation(args, np.zeros(1)).draw(Position(*place), np.zeros(9), None)
            for side in ("past", "future"):
                ((_, (_, cents)),) = found.keywords[side]
                drawn.add(tuple(cents.tolist()))
    assert len(drawn) == 16


@pytest.mark.parametrize(
    ("words", "past", "future"),
    [
        (["--augment_past"], True, False),
        (["--augment_future"], False, True),
        (["--augment_past", "--augment_future"], True, True),
        (["--augment_past", "--augment_future", "--augment_prob", "0.5"], True, True),
        (["--augment_past", "--past_equal_future"], None, True),
        (["--augment_past", "--supervised"], None, True),
    ],
    ids=str,
)
def test_sides_are_augmented_as_asked_for(words, past, future, tiny_corpus):
    clean = epoch_of(tiny_corpus)
    for position, batch in epoch_of(tiny_corpus, *words, "--augment_type", "reverb").items():
        waveform, n_rows = clean[position].waveform, len(batch.window)
        n_rows = max(1, round(n_rows / 2)) if "0.5" in words else n_rows
        assert differ(batch.waveform, waveform)[:n_rows].tolist() == [future] * n_rows
        assert not differ(batch.waveform, waveform)[n_rows:].any()
        if past is None:
            assert batch.past is None
            continue
        assert differ(batch.past, waveform[:n_rows]).tolist() == [past] * n_rows
        assert differ(batch.past, batch.waveform[:n_rows]).all()


def test_effects_are_chained_in_order_or_one_is_chosen(tiny_corpus):
    args = parsed("--augment_past", "--augment_type", "reverb", "pitch_dropout", "none")
    draws = [Position(0, 0, 0), np.zeros(200, dtype=np.int64), None]
    chain = Augmentation(args, np.zeros(1)).draw(*draws).keywords["past"]
    names = {effects.reverberate: "reverb", effects.drop_out: "dropout"}
    assert [names.get(effect, "pitch") for effect, _ in chain] == ["reverb", "pitch", "dropout"]
    assert all(rows.tolist() == [*range(200)] for _, (rows, *_) in chain)
    args.augment_combine = "choice"
    (_, (reverb, *_)), (_, (pitch, *_)), (_, (dropout, *_)) = (
        Augmentation(args, np.zeros(1)).draw(*draws).keywords["past"]
    )
    assert torch.equal(pitch, dropout)
    assert not {*reverb.tolist()} & {*pitch.tolist()}
    assert 40 < len(reverb) < 95
    assert 40 < len(pitch) < 95


def test_parameters_are_within_their_bounds():
    words = ["--shift_max", "50", "--t_ms", "20", "--min_snr_in_db", "3", "--max_snr_in_db", "4"]
    types = ["pitch", "time_dropout", "additive", "bandreject"]
    args = parsed("--augment_past", *words, "--augment_type", *types)
    recipe = Augmentation(args, np.zeros(1)).draw(
        Position(0, 0, 0), np.zeros(500, dtype=int), one_file()
    )
    (_, (_, cents)), (_, (_, start, length)), (_, (_, noise, snr)), (_, (_, low, high)) = (
        recipe.keywords["past"]
    )
    assert (cents.min(), cents.max()) == (-50, 50)
    assert (length.min(), length.max()) == (0, 320)
    assert start.min() >= 0
    assert (start + length).max() <= 3200
    assert 3 <= snr.min() < 3.1
    assert 3.9 < snr.max() <= 4
    assert noise.std(1).min() > 0  # coloured: there is one speaker
    assert low.min() >= 0
    assert high.max() <= 8000
    assert (high >= low).all()


def one_file():
    return SimpleNamespace(
        audio=torch.ones(10_000), layout=Layout(np.array([0]), np.array([0, 10_000]))
    )


def test_babble_is_of_other_speakers():
    """Each sample of the pack is ten to the power of its speaker."""
    speakers, lengths = np.array([0, 0, 1, 2, 3]), [700, 500, 300, 90, 2000]
    audio = torch.cat([torch.full((n,), 10.0**s) for s, n in zip(speakers, lengths, strict=True)])
    layout = Layout(np.arange(5), np.cumsum([0, *lengths]))
    rows = np.repeat([0, 1, 2, 3], 300)
    draws = Draws(rows, SimpleNamespace(audio=audio, layout=layout), torch.Generator())
    babble = draws.babble(speakers, 100)
    assert babble.shape == (1200, 100)
    for speaker in range(4):
        digits = babble[rows == speaker].long() // 10**speaker % 10
        assert not digits.any()
        assert len(babble[rows == speaker].unique()) > 5
    alone = Layout(np.array([0, 1]), np.array([0, 700, 1200]))
    draws = Draws(rows[:1], SimpleNamespace(audio=audio[:1200], layout=alone), torch.Generator())
    assert draws.babble(speakers, 100) is None


def test_there_is_an_effect_for_every_type():
    augmentation = Augmentation(parsed("--augment_past", "--augment_type", "pitch"), np.zeros(1))
    assert {
        name for names in AUGMENT_TYPES.values() for name in names
    } == augmentation.effects.keys()


# -------------------------------------------------------------------------------------------- flow


@pytest.mark.parametrize("n_past", [4, 2])
@pytest.mark.parametrize("words", [[], EXAMPLE, [*EXAMPLE, "--cpc_mode", "reverse"]], ids=len)
def test_doubled_pass_equals_two_single_ones(words, n_past):
    """In loss and gradients; frames to predict, negatives and the self loop are the future's."""
    args = parsed(*words)
    past, waveform = torch.randn(n_past, 1, 3200), torch.randn(4, 1, 3200)
    zeros, results = torch.zeros(4, dtype=torch.int64), []
    for is_doubled in (True, False):
        torch.manual_seed(3)
        networks = Networks(build_criterion(args, 1), build_model(args))
        torch.manual_seed(4)  # negatives
        if is_doubled:
            losses, _ = networks(Batch(waveform, zeros, None, zeros, zeros.bool(), past))
        else:
            model = networks.model
            context, _ = model(torch.cat([past, waveform[n_past:]]))
            losses = networks.criterion(context, model(waveform)[1], zeros).losses
        losses.sum().backward()
        results.append([losses, *(p.grad for p in networks.parameters())])
    for doubled, single in zip(*results, strict=True):
        assert_close(doubled, single.detach())


@pytest.mark.parametrize(
    "words",
    [
        [*CHAIN, *EXAMPLE],
        [
            *CHAIN,
            "none",
            "--augment_future",
            "--samplingType",
            "sequential",
            "--augment_combine",
            "choice",
        ],
        ["--supervised", *CHAIN, "--additive_noise_snr", "10", "--noise_band", "80-240"],
    ],
    ids=["chain", "choice", "supervised"],
)
def test_a_run_stopped_inside_an_epoch_resumes_bit_for_bit(
    words, tiny_corpus, tmp_path, monkeypatch
):
    words = [*words, "--max_size_loaded", "100000"]
    whole = trained(tiny_corpus, tmp_path / "whole", *words)
    signal_in_step(5, monkeypatch)
    flags = ["--pathCheckpoint", tmp_path / "parts"]
    assert run(*on(tiny_corpus), *SMALL, "--nEpoch", 2, *words, *flags) == 128 + signal.SIGTERM
    assert run(*flags) == 0
    assert_same(whole, checkpoint(tmp_path / "parts", 1))


def test_validation_is_clean_and_other_runs_never_import_augmentation(
    tiny_corpus, tmp_path, monkeypatch
):
    words = ["--learningRate", "0"]
    augmented = trained(tiny_corpus, tmp_path / "augmented", *words, *CHAIN, epochs=1)["logs"]
    for module in ("augmentation", "utils.data.effects"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    words += ["--augment_past", "--augment_type", "none"]
    plain = trained(tiny_corpus, tmp_path / "plain", *words, epochs=1)["logs"]
    assert augmented["locLoss_val"] == plain["locLoss_val"]
    assert augmented["locLoss_train"] != plain["locLoss_train"]


def test_recordings_that_were_moved_are_named_again(tiny_corpus, tmp_path, capsys):
    noise, responses = tmp_path / "noise", tmp_path / "responses"
    for directory, name in [(noise, "hum"), (noise, "left_out"), (responses, "hall")]:
        directory.mkdir(exist_ok=True)
        audio = np.random.default_rng(0).uniform(-0.5, 0.5, 1000)
        soundfile.write(directory / f"{name}.wav", audio, SAMPLE_RATE)
    listed = tmp_path / "names.txt"
    listed.write_text("hum\n")
    words = ["--augment_past", "--augment_type", "additive", "natural_reverb"]
    words += ["--pathDBNoise", noise, "--pathSeqNoise", listed, "--pathImpulseResponses", responses]
    trained(tiny_corpus, tmp_path / "run", *words, epochs=1)
    noise.rename(tmp_path / "moved")
    resume = ["--pathCheckpoint", tmp_path / "run", "--nEpoch", 2]
    assert run(*resume) == 2
    assert f"--pathDBNoise {noise}: no such directory" in capsys.readouterr().err
    assert run(*resume, "--pathDBNoise", tmp_path / "moved") == 0
    assert "warning" not in capsys.readouterr().out
    listed.write_text("left_out\n")
    assert run(*resume, "--nEpoch", 3, "--pathDBNoise", tmp_path / "moved") == 0
    assert "warning: the noise or impulse response set isn't the one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--augment_past"], "--augment_past needs --augment_type"),
        (["--augment_type", "pitch"], "--augment_past, --augment_future or both"),
        ([*CHAIN, "swirl"], "invalid choice: 'swirl'"),
        ([*CHAIN, "--bandreject_scaler", "2"], "needs --augment_type bandreject"),
        ([*CHAIN, "natural_reverb"], "natural_reverb needs --pathImpulseResponses DIR"),
        ([*CHAIN, "--pathDBNoise", "nowhere"], "--pathDBNoise .*nowhere: no such directory"),
        ([*CHAIN, "--pathSeqNoise", "names"], "--pathSeqNoise needs --pathDBNoise"),
        ([*CHAIN, "--noise_band", "240-80"], "'240-80': must be LOW-HIGH in Hz"),
        ([*CHAIN, "--min_snr_in_db", "30"], "--min_snr_in_db 30.0: above --max_snr_in_db"),
        ([*CHAIN, "--additive_noise_snr", "9", "--min_snr_in_db", "3"], "--additive_noise_snr"),
        ([*CHAIN, "--augment_prob", "0"], "--augment_prob 0.0: must be from 0.01"),
        (
            [*CHAIN, "--augment_prob", "0.5", "--samplingType", "sequential"],
            "stay clean; leave it out",
        ),
        ([*CHAIN, "--cpc_mode", "none"], "--augment_type has no effect with --cpc_mode none"),
        (
            [*CHAIN, "--supervised", "--augment_future"],
            "--augment_future has no effect with --supervised",
        ),
        ([*CHAIN, "time_dropout", "--t_ms", "500"], "--t_ms 500: longer than a window"),
        (["--augment_future", "--augment_type", "pitch", "--past_equal_future"], "--augment_past"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_what_makes_no_sense_is_refused(words, said, tiny_corpus, tmp_path, capsys):
    with ends_refused(capsys, said):
        train.main([*on(tiny_corpus), *SMALL, "--pathCheckpoint", str(tmp_path / "run"), *words])


def test_each_effect_can_be_heard_and_seen(tiny_corpus, tmp_path, capsys):
    path = next((tiny_corpus / "audio").rglob("*.flac"))
    words = [str(path), str(tmp_path), "--augment_type", "time_dropout", "reverb"]
    hear_augmentation.main(words)
    clean, dropout, both = (
        soundfile.read(tmp_path / f"{name}.wav")[0]
        for name in ("clean", "time_dropout", "time_dropout_reverb")
    )
    assert np.array_equal(clean, soundfile.read(path)[0])
    assert 0 < (dropout != clean).sum() <= 1600
    assert len(both) == len(clean)
    assert (tmp_path / "spectrograms.png").stat().st_size > 10_000
    with ends_refused(capsys, "--pathDBNoise nowhere: no such directory"):
        hear_augmentation.main([*words, "additive", "--pathDBNoise", "nowhere"])


@pytest.mark.parametrize(("side", "kept"), [([], None), (["--augment_past"], ["pitch"])])
def test_a_stored_type_without_a_side_is_ignored_as_in_the_original(side, kept):
    args = parsed("--augment_type", "pitch", *side)
    complete(args, set())
    assert args.augment_type == kept
