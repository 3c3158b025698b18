"""A formant synthesiser in numpy, whose phone boundaries are exact to the sample.

Source and filter, as in Fant, "Acoustic theory of speech production" (1960), and Klatt, "Software
for a cascade/parallel formant synthesizer", JASA 67 (1980). Glottal pulses, and the noise of
breath, excite a cascade of resonances: the formants of the vocal tract. The noise of fricatives and
of bursts arises at the lips and teeth, after that cascade, and has a separate spectrum.

PHONES defines the phones, `draw_speaker` a voice, and `speak` turns phones into a waveform and its
labels. `ControlTracks` come in between: the value of each control over time.

Levels are in dB, where 0 dB is the loudness of the speaker's neutral vowel (AX).
"""

import itertools
from typing import NamedTuple

import numpy as np

from utils.misc import SAMPLE_RATE, SAMPLES_PER_FRAME

SILENT = -80.0  # dB; sources below AUDIBLE are left out
AUDIBLE = -60.0  # dB
N_FFT = 512  # an impulse response lasts at most 32 ms
FREQUENCIES = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)  # Hz, (257,)
NOISE_HOP = 80  # samples: noise is filtered in overlapping frames of 10 ms, one every 5 ms
BLOCK = 128  # spectra computed at a time: they stay in the processor's cache

BANDWIDTHS = (60, 80, 120, 160, 200, 250, 300)  # Hz, of F1 to F7
UPPER_FORMANTS = (3500, 4500, 5500, 6500)  # Hz, F4 to F7: they depend only on the speaker

ARTICULATION = 0.025 * SAMPLE_RATE  # samples from a boundary to the target, for tongue and lips...
ONSET = 0.005 * SAMPLE_RATE  # ...and for the sources of sound, which switch much faster
DURATION_SCATTER = 0.18  # of the logarithm of a phone's duration
FORMANT_SCATTER = 0.03  # of the logarithm of a formant's frequency, from token to token
DECLINATION = 0.15  # fall of log pitch over an utterance
PITCH_MOVEMENT = 0.2  # seconds between two independent values of the pitch
SHIMMER = 0.05  # scatter of the strength of glottal pulses
REST = {  # the controls and their values before an utterance begins
    "F1": 500,  # Hz: the formants of a uniform tube
    "F2": 1500,
    "F3": 2500,
    "voice": SILENT,  # dB
    "aspiration": SILENT,
    "frication": SILENT,
    "centre": 3000,  # Hz, of frication's bell-shaped spectrum
    "width": 2000,
}


# The phones. Frequencies of an adult man's vocal tract, in Hz; durations in ms, of the
# order of Klatt, "Linguistic uses of segmental duration in English", JASA 59 (1976).


class Segment(NamedTuple):
    """A part of a phone in which the sources are constant and formants may glide."""

    fraction: float = 1.0  # of the phone's duration
    formants: list | None = None  # F1, F2, F3; None: interpolated between the neighbours'
    glide_to: list | None = None  # F1, F2, F3 at the end, if they move
    voice: float = SILENT  # level of the glottal pulses, with the speaker's breath
    aspiration: float = SILENT  # level of noise from the glottis
    noise: list | None = None  # centre and half width (standard deviation) of frication
    frication: float = SILENT  # level of that noise


class Phone(NamedTuple):
    duration: float  # ms
    segments: tuple


VOWELS = {  # F1, F2, F3, duration. Men of Peterson and Barney, JASA 24 (1952); AX: a uniform tube
    "IY": (270, 2290, 3010, 110),
    "IH": (390, 1990, 2550, 80),
    "EH": (530, 1840, 2480, 100),
    "AE": (660, 1720, 2410, 120),
    "AA": (730, 1090, 2440, 130),
    "AO": (570, 840, 2410, 130),
    "UH": (440, 1020, 2240, 80),
    "UW": (300, 870, 2240, 110),
    "AH": (640, 1190, 2390, 80),
    "ER": (490, 1350, 1690, 110),
    "AX": (500, 1500, 2500, 55),
}
DIPHTHONGS = {  # F1, F2 from, F1, F2 to, duration. After Holbrook and Fairbanks, JSHR 5 (1962)
    "EY": (480, 2000, 320, 2250, 140),
    "AY": (720, 1200, 380, 2100, 150),
    "OY": (520, 850, 380, 2000, 160),
    "OW": (500, 950, 340, 850, 140),
    "AW": (720, 1250, 400, 900, 150),
}
SONORANTS = {  # F1, F2, F3, level, duration. Liquids and glides after Klatt (1980), then nasals
    "W": (290, 610, 2150, -6, 65),
    "Y": (260, 2070, 3020, -6, 60),
    "R": (310, 1060, 1380, -6, 60),
    "L": (310, 1050, 2880, -6, 60),
    "M": (250, 1050, 2200, -12, 70),
    "N": (250, 1500, 2500, -12, 65),
    "NG": (250, 2050, 2700, -12, 80),
}
# Noise: centre, half width, level. That of sibilants is narrow and strong, that of the others broad
# and weak, as in Jongman, Wayland and Wong, JASA 108 (2000).
FRICATIVES = {  # F1, F2, F3, noise, level of the voice, duration
    "F": (300, 1000, 2300, (4500, 4000, -20), SILENT, 80),
    "TH": (300, 1400, 2500, (5500, 3500, -24), SILENT, 80),
    "S": (300, 1700, 2600, (6200, 1500, -8), SILENT, 95),
    "SH": (300, 1800, 2500, (3300, 1100, -6), SILENT, 95),
    "V": (270, 1000, 2300, (4500, 4000, -26), -14, 60),
    "DH": (270, 1400, 2500, (5500, 3500, -30), -14, 50),
    "Z": (270, 1700, 2600, (6200, 1500, -14), -16, 75),
    "ZH": (270, 1800, 2500, (3300, 1100, -12), -16, 70),
}
# The formants of a stop are its locus, where those of the vowels beside it point to: Delattre,
# Liberman and Cooper, JASA 27 (1955). The voice is that heard through the closure.
STOPS = {  # F1, F2, F3, noise of the burst, level of the voice, duration
    "P": (250, 800, 2200, (900, 900, -12), SILENT, 90),
    "T": (250, 1750, 2650, (5000, 1800, -8), SILENT, 90),
    "K": (250, 1900, 2400, (2000, 800, -9), SILENT, 95),
    "B": (220, 800, 2200, (900, 900, -18), -22, 65),
    "D": (220, 1750, 2650, (4500, 1800, -16), -22, 65),
    "G": (220, 1900, 2400, (2000, 800, -16), -22, 70),
}
AFFRICATES = {  # as stops, with a long release
    "CH": (250, 1800, 2500, (3400, 1200, -6), SILENT, 120),
    "JH": (230, 1800, 2500, (3400, 1200, -13), -22, 90),
}
RELEASE_ASPIRATION = -16.0  # dB, between the burst of P, T, K and the next phone
SILENCE = "SIL"
SILENCE_DURATION = 150  # ms


def _stop(formants, noise, voice):
    """A closure and a burst; if voiceless, then aspiration towards the next phone."""
    *noise, level = noise
    closure = Segment(0.75, formants, voice=voice)
    burst = Segment(0.25, formants, voice=voice, noise=noise, frication=level)
    if voice > SILENT:
        return closure, burst
    aspiration = Segment(0.3, aspiration=RELEASE_ASPIRATION)
    return closure._replace(fraction=0.55), burst._replace(fraction=0.15), aspiration


def _affricate(formants, noise, voice):
    """A closure, then frication for more than half the time."""
    *noise, level = noise
    closure = Segment(0.45, formants, voice=voice)
    return closure, closure._replace(fraction=0.55, noise=noise, frication=level)


def _phones():
    """The tables above as symbol -> Phone; silence comes first, then alphabetical order."""
    phones = {"HH": Phone(60, (Segment(aspiration=-14.0),))}
    for symbol, (*formants, duration) in VOWELS.items():
        phones[symbol] = Phone(duration, (Segment(1.0, formants, voice=0.0),))
    for symbol, (*glide, duration) in DIPHTHONGS.items():
        start, end = [*glide[:2], 2500], [*glide[2:], 2500]
        phones[symbol] = Phone(duration, (Segment(1.0, start, end, voice=0.0),))
    for symbol, (*formants, voice, duration) in SONORANTS.items():
        phones[symbol] = Phone(duration, (Segment(1.0, formants, voice=voice),))
    for symbol, (*formants, (*noise, level), voice, duration) in FRICATIVES.items():
        segment = Segment(1.0, formants, voice=voice, noise=noise, frication=level)
        phones[symbol] = Phone(duration, (segment,))
    for table, build in ((STOPS, _stop), (AFFRICATES, _affricate)):
        for symbol, (*formants, noise, voice, duration) in table.items():
            phones[symbol] = Phone(duration, build(formants, noise, voice))
    silence = Phone(SILENCE_DURATION, (Segment(),))
    return {SILENCE: silence} | dict(sorted(phones.items()))


PHONES = _phones()
PHONE_IDS = {symbol: identity for identity, symbol in enumerate(PHONES)}


# Speakers.


class Speaker(NamedTuple):
    """The parameters of a voice."""

    formant_scale: float  # formants relative to the tables: a shorter vocal tract has higher ones
    pitch: float  # Hz
    pitch_range: float  # standard deviation of log pitch
    slowness: float  # durations relative to the tables
    damping: float  # bandwidths of the formants relative to BANDWIDTHS
    tilt: float  # slope of the glottal spectrum; 2 is 12 dB an octave
    breath: float  # dB, level of aspiration that goes with the voice
    noise_floor: float  # dB, level of the room relative to the speech


def draw_speaker(rng, female):
    """A random speaker; women have shorter vocal tracts and higher voices."""
    return Speaker(
        formant_scale=rng.uniform(1.05, 1.25) if female else rng.uniform(0.88, 1.08),
        pitch=rng.uniform(160, 250) if female else rng.uniform(80, 150),
        pitch_range=rng.uniform(0.04, 0.14),
        slowness=rng.uniform(0.8, 1.2),
        damping=rng.uniform(0.8, 1.4),
        tilt=rng.uniform(1.6, 2.4),
        breath=rng.uniform(-45, -20),
        noise_floor=rng.uniform(-40, -25),
    )


# Controls over time.


class ControlTracks:
    """Every control over the course of an utterance: keyframes with linear interpolation."""

    def __init__(self):
        self.keyframes = {control: [(0.0, value)] for control, value in REST.items()}

    def hold(self, control, start, end, value, margin, end_value=None):
        """Hold `control` at `value`, or move it to `end_value`, from sample `start` to `end`.

        Transitions take `margin` samples at either end, but at most 30 % of the duration.
        """
        margin = min(margin, 0.3 * (end - start))
        end_value = value if end_value is None else end_value
        self.keyframes[control] += [(start + margin, value), (end - margin, end_value)]

    def at(self, control, samples):
        """The values of `control` at `samples`, (n,) -> (n,)."""
        return np.interp(samples, *zip(*self.keyframes[control], strict=True))

    def formants(self, samples):
        return [self.at(formant, samples) for formant in ("F1", "F2", "F3")]


def _draw_boundaries(symbols, speaker, rng):
    """The boundaries of the phones in samples, (len(symbols) + 1,)."""
    typical = np.array([PHONES[symbol].duration for symbol in symbols]) * SAMPLE_RATE / 1000
    scatter = np.exp(DURATION_SCATTER * rng.standard_normal(len(symbols)))
    durations = (speaker.slowness * scatter * typical).astype(int)
    return np.concatenate([[0], np.cumsum(durations)])


def _plan_tracks(symbols, boundaries, speaker, rng):
    """The `ControlTracks` of the phones; formants of tokens deviate a little from the tables."""
    tracks = ControlTracks()
    for symbol, (start, end) in zip(symbols, itertools.pairwise(boundaries), strict=True):
        scale = speaker.formant_scale * np.exp(FORMANT_SCATTER * rng.standard_normal(3))
        duration = end - start
        for segment in PHONES[symbol].segments:
            stop = start + segment.fraction * duration
            _add_segment(tracks, segment, start, stop, scale, speaker)
            start = stop
    return tracks


def _add_segment(tracks, segment, start, end, scale, speaker):
    for control in ("voice", "aspiration", "frication"):
        tracks.hold(control, start, end, getattr(segment, control), ONSET)
    if segment.formants:
        first = scale * segment.formants
        last = scale * (segment.glide_to or segment.formants)
        for control, value, end_value in zip(("F1", "F2", "F3"), first, last, strict=True):
            tracks.hold(control, start, end, value, ARTICULATION, end_value)
    if segment.noise:
        # The cavity in front of a constriction differs less between speakers than the whole tract.
        for control, value in zip(("centre", "width"), segment.noise, strict=True):
            tracks.hold(control, start, end, value * np.sqrt(speaker.formant_scale), ONSET)


# From controls to sound.


class Tract:
    """The vocal tract of one speaker, and the spectra of the sources that excite it.

    `pulse` (257,) and `hiss` (a number, white noise) make a neutral vowel of RMS 1 when the vocal
    folds close at the speaker's pitch, or when they whisper.
    """

    def __init__(self, speaker):
        bandwidths = speaker.damping * np.array(BANDWIDTHS)
        upper_formants = speaker.formant_scale * np.array(UPPER_FORMANTS)
        self.lower_bandwidths = bandwidths[:3]
        self.upper = _resonance(upper_formants, bandwidths[3:]).prod(axis=0)
        glottis = 1 / (1 + 1j * FREQUENCIES / 250) ** speaker.tilt
        radiation = 1 + 1j * FREQUENCIES / 700  # from the lips: plus 6 dB an octave
        neutral = self.response(speaker.formant_scale * np.array(VOWELS["AX"][:3])[:, None])[0]
        pulse = np.fft.irfft(neutral * glottis * radiation)
        self.pulse = glottis * radiation / np.sqrt(np.sum(pulse**2) * speaker.pitch / SAMPLE_RATE)
        self.hiss = 1 / np.sqrt(np.mean(np.abs(neutral) ** 2))

    def response(self, formants):
        """Spectra (n, 257) of the vocal tract, given the arrays `formants`: F1, F2 and F3."""
        response = self.upper
        for formant, bandwidth in zip(formants, self.lower_bandwidths, strict=True):
            response = response * _resonance(formant, bandwidth)
        return response


def _resonance(formant, bandwidth):
    """Spectra (n, 257) of resonators with these frequencies (n,) and bandwidths; 1 at 0 Hz."""
    square = np.square(formant)[:, None]
    damping = 1j * FREQUENCIES * np.reshape(bandwidth, (-1, 1))
    return square / (square - FREQUENCIES**2 + damping)


def _draw_pulses(n_samples, speaker, rng):
    """The samples at which the vocal folds close, with the intonation of an utterance."""
    time = np.arange(n_samples) / SAMPLE_RATE
    knots = np.arange(0, time[-1] + 2 * PITCH_MOVEMENT, PITCH_MOVEMENT)
    movement = np.interp(time, knots, rng.standard_normal(len(knots)))
    log_pitch = speaker.pitch_range * movement - DECLINATION * time / time[-1]
    cycles = np.cumsum(speaker.pitch * np.exp(log_pitch)) / SAMPLE_RATE
    return np.flatnonzero(np.diff(np.floor(cycles)))


def _add_voice(waveform, tracks, tract, pulses, rng):
    """Add the response of the tract to each of the glottal `pulses`."""
    strength = _amplitude(tracks.at("voice", pulses))
    pulses, strength = pulses[strength > 0], strength[strength > 0]
    strength *= 1 + SHIMMER * rng.standard_normal(len(pulses))
    for block in _blocks(pulses):
        spectra = tract.response(tracks.formants(pulses[block])) * tract.pulse
        _overlap_add(waveform, pulses[block], strength[block, None] * spectra)


def _add_noise(waveform, tracks, tract, breath, rng):
    """Add aspiration, which passes through the tract, and frication, which doesn't."""
    starts = np.arange(0, len(waveform) - N_FFT, NOISE_HOP)
    noise = rng.standard_normal(len(waveform))
    centres = starts + NOISE_HOP
    with_voice = _amplitude(tracks.at("voice", centres) + breath)
    aspiration = tract.hiss * np.hypot(_amplitude(tracks.at("aspiration", centres)), with_voice)
    frication = _amplitude(tracks.at("frication", centres))
    window = np.hanning(2 * NOISE_HOP + 1)[:-1]  # overlapping windows sum to 1
    frames = np.lib.stride_tricks.sliding_window_view(noise, len(window))[starts]
    for block in _blocks(starts):
        filters = aspiration[block, None] * tract.response(tracks.formants(centres[block]))
        filters += frication[block, None] * _frication_spectra(tracks, centres[block])
        _overlap_add(waveform, starts[block], filters * np.fft.rfft(window * frames[block], N_FFT))


def _frication_spectra(tracks, samples):
    """Bell curves (n, 257) that turn white noise of power 1 into frication of power 1."""
    centre, width = tracks.at("centre", samples), tracks.at("width", samples)
    bell = np.exp(-0.5 * ((FREQUENCIES - centre[:, None]) / width[:, None]) ** 2)
    return bell / np.sqrt(np.mean(bell**2, axis=1, keepdims=True))


def _amplitude(level):
    """Decibels to a factor; exactly 0 below AUDIBLE."""
    return np.where(level > AUDIBLE, 10 ** (level / 20), 0.0)


def _blocks(rows):
    """Slices that divide `rows` into blocks of BLOCK."""
    return [slice(first, first + BLOCK) for first in range(0, len(rows), BLOCK)]


def _overlap_add(waveform, starts, spectra):
    """Add the impulse responses of `spectra` (n, 257) to `waveform`, each at its start."""
    for start, response in zip(starts, np.fft.irfft(spectra, N_FFT), strict=True):
        waveform[start : start + N_FFT] += response


def speak(symbols, speaker, rng):
    """Synthesise the phones `symbols`, which should begin and end with silence.

    Returns a waveform, (L,) float64, in which the speaker's neutral vowel has RMS 1, and the
    boundaries of the phones in samples, (len(symbols) + 1,) from 0 to L.
    """
    boundaries = _draw_boundaries(symbols, speaker, rng)
    tracks = _plan_tracks(symbols, boundaries, speaker, rng)
    tract = Tract(speaker)
    n_samples = boundaries[-1]
    waveform = np.zeros(n_samples + N_FFT)
    _add_voice(waveform, tracks, tract, _draw_pulses(n_samples, speaker, rng), rng)
    _add_noise(waveform, tracks, tract, speaker.breath, rng)
    return waveform[:n_samples], boundaries


def frame_labels(symbols, boundaries):
    """The phone in the middle of each whole frame of 10 ms, as ids, (L // 160,)."""
    middles = np.arange(boundaries[-1] // SAMPLES_PER_FRAME) * SAMPLES_PER_FRAME
    middles += SAMPLES_PER_FRAME // 2
    identities = np.array([PHONE_IDS[symbol] for symbol in symbols])
    return identities[np.searchsorted(boundaries, middles, side="right") - 1]
