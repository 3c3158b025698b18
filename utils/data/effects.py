"""Audio effects in plain PyTorch: batched over rows, on any device, without randomness.

A waveform is (B, L) float32 at 16 kHz, and so is what an effect returns: speech stays where it is
in time, so that an augmented window can stand for the clean one frame by frame. Parameters are
tensors with one value (or one signal) per row. A neutral parameter returns the row as it is.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

from utils.misc import SAMPLE_RATE

LOWEST = 50  # Hz: below, coloured noise is white
INAUDIBLE = 1e-8  # mean square, -80 dB: there is no signal-to-noise ratio below it


def fast_length(n):
    """The smallest length from `n` on with a fast FFT: its only factors are 2, 3 and 5."""
    return next(length for length in itertools.count(n) if 30**40 % length == 0)


# ------------------------------------------------------------------------------------------ pitch

SEGMENT, SEARCH, OVERLAP = 640, 200, 160  # samples: 40, 12.5 and 10 ms
HOP = SEGMENT - OVERLAP
LEAN = 32  # samples, see `stretch`


def shift_pitch(waveform, cents, max_cents):
    """Shift the pitch by `cents` (B,), at most `max_cents`, without changing the duration.

    The waveform is stretched in time by WSOLA (Verhelst and Roelands, "An overlap-add technique
    based on waveform similarity", 1993), then resampled to its old length. Formants move as well,
    as for a speaker of another size. Shapes depend on `max_cents` only: a GPU never waits.
    """
    ratio = 2 ** (cents / 1200)
    n_segments = math.ceil(waveform.size(1) * 2 ** (max_cents / 1200) / HOP) + 1
    stretched = stretch(waveform, ratio, n_segments)
    times = ratio[:, None] * torch.arange(waveform.size(1), device=waveform.device)
    return torch.where((cents == 0)[:, None], waveform, interpolate(stretched, times))


def stretch(waveform, ratio, n_segments):
    """Stretch each row by its ratio (B,) in time: (B, L) -> (B, n_segments * HOP).

    Each segment is taken from the place, near its own in time, where the input best continues the
    previous segment: where the normalised cross-correlation is highest. While within reach, that is
    where the input itself continues, so segments drift to one side. The search therefore leans to
    the other side, just enough to leave no mean lag on speech.
    """
    padded, latest = F.pad(waveform, (0, SEGMENT + SEARCH)), waveform.size(1)
    centres = torch.arange(n_segments, device=waveform.device) * HOP + SEGMENT / 2
    places = centres / ratio[:, None] - SEGMENT / 2  # so that the middle of a segment is in time
    starts = [places[:, 0].round().long().clamp(0, latest)]
    reach = SEARCH / 2 + LEAN * (ratio[:, None] - 1).sign()
    lowest = (places - reach).round().long().clamp(0, latest)
    for first in lowest.unbind(1)[1:]:
        continuation = _slices(padded, starts[-1] + HOP, OVERLAP)
        region = _slices(padded, first, SEARCH + OVERLAP)
        products = region.unfold(1, OVERLAP, 1) @ continuation.unsqueeze(2)
        energies = F.avg_pool1d(region.square().unsqueeze(1), OVERLAP, 1).squeeze(1)
        similarity = products.squeeze(2) / (energies + 1e-12).sqrt()
        starts.append(first + similarity.argmax(1))
    segments = _slices(padded, torch.stack(starts, 1), SEGMENT)
    fade_out = torch.linspace(1, 0, OVERLAP + 2, device=waveform.device)[1:-1]
    stretched = segments[:, :, :HOP].clone()
    stretched[:, 1:, :OVERLAP] += (segments[:, :-1, HOP:] - stretched[:, 1:, :OVERLAP]) * fade_out
    return stretched.flatten(1)


def _slices(waveform, starts, length):
    """`length` samples of each row from each of `starts` on, (B,) or (B, n); zeros past its end."""
    index = starts.unsqueeze(-1) + torch.arange(length, device=waveform.device)
    within = index.clamp(max=waveform.size(1) - 1)
    return waveform.gather(1, within.flatten(1)).view(index.shape)


def interpolate(waveform, times):
    """The waveform at `times` (B, L'), in samples, by cubic interpolation (Catmull and Rom)."""
    whole = times.floor()
    t, last = times - whole, waveform.size(1) - 1
    a, b, c, d = (
        waveform.gather(1, (whole.long() + shift).clamp(0, last)) for shift in (-1, 0, 1, 2)
    )
    return b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


# ----------------------------------------------------------------------------------------- reverb

REVERBERANCE, DAMPING = 0.5, 0.5  # of SoX, as in the paper
COMBS = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617)  # delays in samples at 44.1 kHz
ALL_PASSES = (225, 341, 441, 556)
SPREAD = 12  # samples at 44.1 kHz by which the delays of the second ear differ
GAIN = 0.015
N_BINS = 2**16  # of an FFT in which even the longest response fades to nothing


@functools.cache
def room_response(room, length):
    """The impulse response of SoX's `reverb` in a room of size `room`, 0 to 100: (length,).

    That is Freeverb: for each of two ears, eight parallel combs and four all-passes in series, here
    evaluated in closed form, by their transfer functions. The direct sound is 1, at the start.
    """
    scale = 0.1 + 0.9 * room / 100
    slope = -1 / math.log(0.7)
    offset = 1 / (1 + slope * math.log(0.02))
    feedback = 1 - math.exp((REVERBERANCE - offset) / (slope * offset))
    damping = 0.2 + 0.3 * DAMPING
    roots = torch.exp(-2j * math.pi / N_BINS * torch.arange(N_BINS, dtype=torch.float64))
    bins = torch.arange(N_BINS // 2 + 1)

    def delay(samples):
        return roots[bins * round(samples) % N_BINS]

    low_pass = feedback * (1 - damping) / (1 - damping * delay(1))

    def ear(spread):
        delays = [
            (samples + spread * (-1) ** i) * SAMPLE_RATE / 44_100
            for i, samples in enumerate(COMBS + ALL_PASSES)
        ]
        combs = [delay(scale * samples) for samples in delays[: len(COMBS)]]
        response = sum(comb / (1 - low_pass * comb) for comb in combs)
        for echo in map(delay, delays[len(COMBS) :]):
            response = response * (echo / (1 - echo / 2) - 1)
        return response

    wet = GAIN * (ear(0) + ear(SPREAD)) / 2
    response = torch.fft.irfft(wet, N_BINS)[:length].float()
    response[0] += 1
    return response


def reverberate(waveform, responses):
    """Convolve each row with its impulse response, (B, T)."""
    n = fast_length(waveform.size(1) + responses.size(1))
    spectrum = torch.fft.rfft(waveform, n) * torch.fft.rfft(responses, n)
    return torch.fft.irfft(spectrum, n)[:, : waveform.size(1)]


def from_direct_path(response):
    """A recorded impulse response (n,) from its direct path on, which is scaled to 1.

    Otherwise speech would come later than in the clean window, and at another level.
    """
    direct = response.abs().argmax()
    return response[direct:] / response[direct] if response.any() else torch.ones(1)


# ----------------------------------------------------------------------------- noise, bands, gaps

TRANSITION = 200  # Hz: width of the edges of a band
RINGING = 1600  # samples after the end of a row into which its filter may ring


def only_band(waveform, low, high):
    """The waveform after a zero-phase band-pass filter, `low` to `high` Hz, (B,) each."""
    n = fast_length(waveform.size(1) + RINGING)
    frequencies = torch.fft.rfftfreq(n, 1 / SAMPLE_RATE, device=waveform.device)

    def below(edge):
        """1 below the edge, 0 above it, with half a period of a sine between them."""
        distance = (edge[:, None] - frequencies) / TRANSITION
        return (1 + torch.sin(math.pi * distance.clamp(-0.5, 0.5))) / 2

    spectrum = torch.fft.rfft(waveform, n) * (below(high) - below(low))
    return torch.fft.irfft(spectrum, n)[:, : waveform.size(1)]


def reject_band(waveform, low, high):
    """Remove what lies between `low` and `high` Hz, (B,) each."""
    return waveform - only_band(waveform, low, high)


def add_noise(waveform, noise, snr, *band):
    """Add noise (B, L) at the signal-to-noise ratio `snr` (B,) in dB, by the energies of the rows.

    band: the edges in Hz, (B,) each, of the band that the noise is limited to first. Rows in which
    speech or noise is silent stay as they are.
    """
    noise = only_band(noise, *band) if band else noise
    signal_power, noise_power = waveform.square().mean(1), noise.square().mean(1)
    audible = torch.minimum(signal_power, noise_power) > INAUDIBLE
    scale = (signal_power / noise_power.clamp(min=INAUDIBLE)).sqrt() * 10 ** (-snr / 20)
    return waveform + torch.where(audible, scale, 0)[:, None] * noise


def coloured(white, slope):
    """Shape white noise (B, L) so that its power falls as the `slope`-th power of the frequency."""
    n = white.size(1)
    octaves = (torch.fft.rfftfreq(n, 1 / SAMPLE_RATE) / LOWEST).clamp(min=1).log2()
    return torch.fft.irfft(torch.fft.rfft(white) * 2 ** (-slope[:, None] / 2 * octaves), n)


def drop_out(waveform, start, length):
    """Silence `length` samples of each row from `start` on, (B,) each."""
    since = torch.arange(waveform.size(1), device=waveform.device) - start[:, None]
    return waveform.masked_fill((since >= 0) & (since < length[:, None]), 0)
