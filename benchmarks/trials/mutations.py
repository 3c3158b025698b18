"""Damage to corpora and to checkpoints, drawn from a seeded generator.

    corrupt_corpus(random.Random(7), corpus)      what tests/common.write_tiny_corpus has written
    corrupt_file(random.Random(7), path)          any file: bits, ends, other contents
    corrupt_checkpoint(random.Random(7), path, canary)      what is stored, under a sound format

Each returns a line that describes the damage. `Random` is Python's own: the same seed means the
same damage on every machine.
"""

import copy
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import soundfile
import torch

from utils.data.listing import LISTING

PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>\n"
ODD_NAMES = (
    "a b.flac", "a\nb.flac", "-h.flac", ".flac", "a..flac", "\u00e9\u4e2d\U0001f600.flac",
    "\udcff\udcfe.flac", "a" * 240 + ".flac", "%s{}.flac", "10-0-0001.flac.flac", "10-0-0001.FLAC",
)  # fmt: skip
ODD_VALUES = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e300, float("nan"), float("inf"), "", "x",
    "../..", "\0", [], [1], [None], {}, {"a": 1},
)  # fmt: skip


# ------------------------------------------------------------------------------------------ files


def flip_bits(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 2, 10, 100])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut_end(rng, content):
    return content[: rng.randrange(len(content) + 1)]


def zero_block(rng, content):
    start = rng.randrange(len(content) + 1)
    length = min(len(content) - start, rng.choice([1, 16, 512, 4096]))
    return content[:start] + bytes(length) + content[start + length :]


def drop_block(rng, content):
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice([1, 16, 512]) :]


def repeat_block(rng, content):
    start = rng.randrange(len(content) + 1)
    length = rng.choice([1, 16, 512])
    return content[: start + length] + content[start:]


def damage_beginning(rng, content):
    length = rng.choice([1, 4, 26, 64])
    return rng.randbytes(length) + content[length:]


def replace_by_page(rng, content):
    return PAGE


def replace_by_noise(rng, content):
    return rng.randbytes(rng.choice([1, 7, 100, 5000]))


def replace_by_nothing(rng, content):
    return b""


def in_utf16(rng, content):
    return content.decode("latin-1").encode("utf-16")


def with_mark_and_returns(rng, content):
    return b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")


DAMAGE = (
    flip_bits, cut_end, zero_block, drop_block, repeat_block, damage_beginning, replace_by_page,
    replace_by_noise, replace_by_nothing, in_utf16, with_mark_and_returns,
)  # fmt: skip


def corrupt_file(rng, path):
    """Change the content of a file."""
    damage = rng.choice(DAMAGE)
    path.write_bytes(damage(rng, path.read_bytes()))
    return f"{path.name}: {damage.__name__}"


def replace_file(rng, path):
    """Put something that is no regular file in the place of one."""
    kind = rng.choice(["folder", "pipe", "link to nothing", "link to itself", "endless", "gone"])
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        targets = {
            "link to nothing": "nothing",
            "link to itself": path.name,
            "endless": "/dev/zero",
        }
        path.symlink_to(targets[kind])
    return f"{path.name}: {kind}"


# ----------------------------------------------------------------------------------------- corpora


def audio_files(corpus):
    return sorted(path for path in (corpus / "audio").rglob("*.flac") if path.is_file())


def texts(corpus, *names):
    """Lists and labels that are still regular files: nothing here may wait for a pipe."""
    return [corpus / f"{name}.txt" for name in names if (corpus / f"{name}.txt").is_file()]


def corrupt_audio(rng, corpus):
    return corrupt_file(rng, rng.choice(audio_files(corpus)))


def replace_audio(rng, corpus):
    return replace_file(rng, rng.choice(audio_files(corpus)))


def rewrite_audio(rng, corpus):
    """Sound audio of another length, rate, format or number of channels."""
    path = rng.choice(audio_files(corpus))
    samples = rng.choice([0, 1, 100, 159, 3199, 3200, 50_000])
    rate = rng.choice([16_000] * 4 + [8_000, 44_100])
    channels = rng.choice([1, 1, 1, 2, 8])
    kind, subtype = rng.choice([("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16"),
                                ("WAV", "FLOAT"), ("OGG", "VORBIS")])  # fmt: skip
    waveform = np.linspace(-0.5, 0.5, samples * channels).reshape(samples, channels)
    if subtype == "FLOAT" and rng.random() < 0.5:
        waveform[samples // 2 :] = rng.choice([np.nan, np.inf, 7.0])
    soundfile.write(path, waveform, rate, subtype, format=kind)
    return f"{path.name}: {samples} samples, {rate} Hz, {channels} channels, {kind} {subtype}"


def swap_files(rng, corpus):
    audio, lists = audio_files(corpus), texts(corpus, "train", "test", "phones")
    pool = rng.choice([audio, lists, audio + lists])
    one, other = rng.sample(pool, 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name}: swapped"


def rename_audio(rng, corpus):
    path = rng.choice(audio_files(corpus))
    name = rng.choice(ODD_NAMES)
    target = path.parent.with_name(name) if rng.random() < 0.3 else path
    if target != path and not target.exists():
        path.parent.rename(target)
    else:
        path.rename(path.with_name(name))
    return f"{path.name}: {'its folder is' if target != path else ''} named {name!a}"


def copy_audio(rng, corpus):
    """Duplicate a name: in another folder, in the root, or for another speaker."""
    path = rng.choice(audio_files(corpus))
    folder = rng.choice(["", "10", "12/2", "13/new/deeper", "..", "audio"])
    target = corpus / "audio" / folder / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target != path:
        shutil.copy(path, target)
    return f"{path.name}: once more in {folder!r}"


def corrupt_text(rng, corpus):
    return corrupt_file(rng, rng.choice(texts(corpus, "train", "test", "all")))


def corrupt_labels(rng, corpus):
    return corrupt_file(rng, rng.choice(texts(corpus, "phones")))


def replace_text(rng, corpus):
    return replace_file(rng, rng.choice(texts(corpus, "train", "test", "phones")))


def edit_list(rng, corpus):
    path = rng.choice(texts(corpus, "train", "test", "all"))
    lines = path.read_text().splitlines()
    kind = rng.choice(["doubled", "shuffled", "extensions", "paths", "blanks", "strange", "one"])
    lines = {
        "doubled": lines + lines,
        "shuffled": rng.sample(lines, len(lines)),
        "extensions": [f"{line}.flac" for line in lines],
        "paths": [f"10/0/{line}" for line in lines],
        "blanks": ["", *(f"{line} \t" for line in lines), "  "],
        "strange": [*lines, "nobody", "a\0b", "\u00e9", "x" * 10_000],
        "one": lines[:1],
    }[kind]
    path.write_text("\n".join(lines) + rng.choice(["\n", "", "\r\n"]))
    return f"{path.name}: {kind}"


def edit_labels(rng, corpus):
    path = rng.choice(texts(corpus, "phones"))
    lines = [line.split() for line in path.read_text().splitlines()]
    words = rng.choice(lines)
    kind = rng.choice(
        ["value", "shorter", "longer", "unnamed", "twice", "no labels", "gone", "gap"]
    )
    if kind == "value":
        odd = "-1 32766 32767 99999999999999999999 1.0 1e2 0x1 1_0 +3 --3 nan \u0663 , 1,2".split()
        words[rng.randrange(1, len(words))] = rng.choice(odd)
    elif kind == "shorter":
        del words[rng.randrange(2, len(words)) :]
    elif kind == "longer":
        words += ["1"] * rng.choice([1, 2, 1000])
    elif kind == "unnamed":
        del words[0]
    elif kind == "twice":
        lines.append(words)
    elif kind == "no labels":
        del words[1:]
    elif kind == "gone":
        lines.remove(words)
    separator = rng.choice(["  ", "\t", "\u00a0", "\x0b", "\x1c", "\0"]) if kind == "gap" else " "
    path.write_text("".join(separator.join(words) + "\n" for words in lines))
    return f"labels: {kind} {words[0]} {separator!a}"


def damage_listing(rng, corpus):
    """Damage the cached listing of the database; if there is none yet, put anything there."""
    path = corpus / "audio" / LISTING
    if not path.exists():
        path.write_text('{"format": 1, "extensions": {}}')
    ways = [corrupt_file, replace_file, edit_json, edit_json] if path.is_file() else [replace_file]
    return rng.choice(ways)(rng, path)


CORPUS_DAMAGE = (
    corrupt_audio, corrupt_audio, replace_audio, rewrite_audio, swap_files, rename_audio,
    copy_audio, corrupt_text, corrupt_labels, replace_text, edit_list, edit_labels, damage_listing,
    damage_listing,
)  # fmt: skip


def corrupt_corpus(rng, corpus):
    """Damage a corpus in one to three ways."""
    done = []
    for damage in rng.choices(CORPUS_DAMAGE, k=rng.choice([1, 1, 2, 3])):
        try:
            done.append(damage(rng, corpus))
        except (OSError, UnicodeError, ValueError, IndexError):  # too damaged already for this one
            continue
    return "; ".join(done)


# -------------------------------------------------------------------------------- what is in a tree


def nodes(tree, above=()):
    """(container, key) of everything in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def mutate_tree(rng, tree):
    """Change one to three entries in a tree of dicts and lists, equally likely at any depth."""
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        by_depth = {}
        for container, key in nodes(tree):
            kind = (type(container), isinstance(container[key], torch.Tensor))
            by_depth.setdefault((kind, len(container)), []).append((container, key))
        if not by_depth:
            break
        container, key = rng.choice(by_depth[rng.choice(list(by_depth))])
        done.append(_mutate_node(rng, container, key))
    return ", ".join(done)


def _mutate_node(rng, container, key):
    value = container[key]
    kind = rng.choice(["gone", "odd", "odd", "changed", "changed", "renamed"])
    if kind == "gone":
        del container[key]
    elif kind == "renamed" and isinstance(container, dict):
        container[rng.choice(["x", 0, f"{key}x"])] = container.pop(key)
    elif kind == "odd" or not isinstance(value, torch.Tensor | int | float | str | list):
        container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif isinstance(value, torch.Tensor):
        container[key] = rng.choice(TENSOR_CHANGES)(value)
    elif isinstance(value, list):
        container[key] = rng.choice([value + value, value[:-1], value[::-1], [value]])
    elif isinstance(value, str):
        container[key] = value + rng.choice(["x", "\n", "\0", " "])
    else:
        container[key] = rng.choice([-value, value + 1, value * 1000, float(value), str(value)])
    return f"{key!a} {kind}"


TENSOR_CHANGES = (
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.complex64),
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten()[:-1].clone(),
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
    lambda t: t.new_zeros(()),
    lambda t: t.new_zeros((0,)),
    lambda t: t.to_sparse() if t.ndim else t,
    lambda t: t.float().clone().requires_grad_(),
    lambda t: torch.nn.Parameter(t.float().clone()),
    lambda t: t.to("meta"),
    lambda t: t.tolist(),
)


def edit_json(rng, path):
    """Change the content of a JSON file, which mostly stays JSON."""
    tree = json.loads(path.read_text())
    if rng.random() < 0.05:
        path.write_text("[" * 100_000)
        return f"{path.name}: very deep"
    holder = [tree]
    done = mutate_tree(rng, holder)
    path.write_text(json.dumps(holder[0] if holder else None, default=str))
    return f"{path.name}: {done}"


# ------------------------------------------------------------------------------------- checkpoints


class Canary:
    """An object whose unpickling, where that runs code, makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def edit_state(rng, path, canary):
    holder = [torch.load(path, weights_only=True)]
    done = mutate_tree(rng, holder)
    torch.save(holder[0] if holder else None, path)
    return f"{path.name}: {done}"


def hide_code(rng, path, canary):
    """Code that plain unpickling would run: alone, or somewhere in a sound checkpoint."""
    state = torch.load(path, weights_only=True)
    place = rng.choice([None, *nodes(state)])
    if place is None:
        state = Canary(canary)
    else:
        container, key = place
        container[key] = Canary(canary)
    kind = rng.choice(["zip", "legacy", "pickle"])
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return f"{path.name}: code ({kind})"


def edit_archive(rng, path, canary):
    """Leave out, swap or damage the files in the archive, and correct its checksums."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    one, other = rng.sample(sorted(files), 2)
    kind = rng.choice(["gone", "swapped", "pickle", "renamed"])
    pickled = next(name for name in files if name.endswith("data.pkl"))
    if kind == "gone":
        del files[one]
    elif kind == "swapped":
        files[one], files[other] = files[other], files[one]
    elif kind == "renamed":
        files[one + "x"] = files.pop(one)
    else:
        files[pickled] = rng.choice(DAMAGE)(rng, files[pickled])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"{path.name}: archive, {kind} {one}"


def corrupt_checkpoint(rng, path, canary):
    """Change the content of a checkpoint. `canary`: a path that only code in the file creates."""
    damage = rng.choice([edit_state, edit_state, edit_state, edit_state, hide_code, edit_archive])
    return damage(rng, path, canary)
