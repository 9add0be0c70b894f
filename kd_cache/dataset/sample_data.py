"""The embedded sample: a small synthetic soundscape set, laid out as TAU Urban Acoustic Scenes is, made of arithmetic.

No audio and no third-party data are in it. A clip is a log-mel picture ``[T, F]`` built from what a scene, a city, a
location and one moment contribute, then heard through a device; twins are one moment heard through two devices.

The same bytes come out on every machine: the randomness of a clip is the SHAKE-256 stream of its *name* (never of its
position), arithmetic is float64 + − × ÷, square root and floor, which IEEE 754 rounds in one way only
(no exp, sin or matrix product, whose last bits depend on the CPU), sums are exact (`math.fsum`), and what is stored
is a multiple of 1/64, which float16 holds exactly.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kd_cache.dataset.manifest import FRONT_END, LISTS
from kd_cache.dataset.task import DCASE
from kd_cache.errors import StoreError, UsageError, listed, shown
from kd_cache.keys import NO_LABEL

VERSION = 2
"""Of the generator. Another version makes other clips: what was trained or measured on one says nothing of another."""

MELS = 64
FRAMES = 48
"""Enough for the five poolings of CNN14, which needs 32; as float16 under 8 KiB, so a clip takes two disk blocks."""

SAMPLE_CITIES = tuple(city for city in DCASE.cities if city not in ("amsterdam", "madrid"))
"""The ten cities of the TAU development sets; labels still count in the list of twelve."""
_PLACES = tuple((scene, city) for scene in DCASE.scenes for city in SAMPLE_CITIES)
TRAIN_MOMENTS: tuple[tuple[int, int], ...] = ((0, 0), (0, 1), (1, 0))  # of each city and scene: location, segment
TEST_MOMENTS: tuple[tuple[int, int], ...] = ((2, 0),)
LOCATIONS = 3  # of each city and scene, numbered through all of them
UNLABELLED_ROUNDS = range(3, 6)  # the large sample's: in a round, each city and scene has one location more
TEST_ROUNDS = range(6, 8)
TRAIN_SHARE = 8  # of twenty combinations of city and scene, how many a target device recorded
TEST_SHARE = 3  # and how many each device but A did

MANIFEST = "dataset.json"
_BESIDE = frozenset({MANIFEST, "features", "teachers", "README.md"})  # as in data/sample itself
_ELSEWHERE = "Name a directory that is empty or does not exist yet."

_STEP = 1 / 64
_CLIP_AT = 31.0  # float16 holds every multiple of 1/64 up to 32

Array = npt.NDArray[np.float64]


class Clip(NamedTuple):
    """One recording. ``location`` is unique in the whole sample; ``segment`` counts the moments at one location."""

    scene: str
    city: str
    location: int
    segment: int
    device: str
    split: str
    is_labelled: bool = True

    @property
    def file(self) -> str:
        """Its name as TAU would write it, device A in lower case."""
        device = self.device.lower()
        return f"features/{self.scene}-{self.city}-{self.location}-{self.segment}-{device}.npy"

    @property
    def moment(self) -> str:
        """What simultaneous twins share: everything but the device."""
        return f"{self.scene}-{self.city}-{self.location}-{self.segment}"


def sample_clips(target: str | None = None) -> tuple[Clip, ...]:
    """Every clip of the sample, in manifest order: train before test, device A first, then by device.

    With a ``target`` the large sample's: that device's train has 300 clips more without scene labels, and each device's
    test 200 more, all of them at locations of their own.
    """
    train = [clip for device in (DCASE.source, *DCASE.targets) for clip in _train_clips(device)]
    test = [clip for device in DCASE.devices for clip in _test_clips(device)]
    if target is not None:
        train += [clip._replace(is_labelled=False) for clip in further_clips(target, UNLABELLED_ROUNDS, "train")]
        test += [clip for device in DCASE.devices for clip in further_clips(device, TEST_ROUNDS, "test")]
    return (*train, *test)


def further_clips(device: str, rounds: Iterable[int], split: str) -> Iterator[Clip]:
    """Clips of which the committed sample has none: in each round one of every city and scene, at a new location.

    Rounds from 8 on are in neither size: benchmarks measure teachers on them. Raises ``ValueError`` for one below 3.
    """
    for which in rounds:
        if which < LOCATIONS:
            raise ValueError(f"round {which} is of the sample's own locations, expected {LOCATIONS} or more")
        for number, (scene, city) in enumerate(_PLACES):
            yield Clip(scene, city, which * len(_PLACES) + number, 0, device, split)


def _train_clips(device: str) -> Iterator[Clip]:
    for number, (scene, city) in enumerate(_PLACES):
        if device == DCASE.source:
            moments = TRAIN_MOMENTS
        elif _recorded(number, device, TRAIN_SHARE):
            moments = (TRAIN_MOMENTS[(number + DCASE.domain_of[device]) % len(TRAIN_MOMENTS)],)
        else:
            continue
        for location, segment in moments:
            yield Clip(scene, city, number * LOCATIONS + location, segment, device, "train")


def _test_clips(device: str) -> Iterator[Clip]:
    for number, (scene, city) in enumerate(_PLACES):
        if device == DCASE.source or _recorded(number, device, TEST_SHARE):
            for location, segment in TEST_MOMENTS:
                yield Clip(scene, city, number * LOCATIONS + location, segment, device, "test")


def _recorded(number: int, device: str, share: int) -> bool:
    """Whether a device other than A was carried to this city and scene; each sees all cities and all scenes."""
    scene, city = divmod(number, len(SAMPLE_CITIES))
    tenth = (scene + city + 3 * DCASE.domain_of[device]) % 10
    return 2 * tenth + scene % 2 < share


def features(clip: Clip) -> npt.NDArray[np.float16]:
    """The clip's log-mel picture, z-scored, ``[T, F]``."""
    heard = _through_device(_soundscape(clip), clip)
    values = heard.ravel().tolist()
    mean = math.fsum(values) / len(values)
    centred = heard - mean
    variance = math.fsum((centred * centred).ravel().tolist()) / len(values)
    score = centred / math.sqrt(variance)
    return (np.clip(np.rint(score / _STEP) * _STEP, -_CLIP_AT, _CLIP_AT)).astype("<f2")


def write_sample(root: Path, target: str | None = None) -> int:
    """Write ``features/*.npy`` and then ``dataset.json``, so that it lists only what is there, under ``root``.

    Writing over an earlier sample is fine: every file gets the same bytes again. With a ``target`` it is the large
    sample of that device. Returns how many features there are.

    Raises:
        UsageError: ``root`` holds something that is not this sample.
        StoreError: a file cannot be written.
    """
    clips = sample_clips(target)
    root = Path(root)
    try:
        _refuse_foreign(root, {Path(clip.file).name for clip in clips})
        (root / "features").mkdir(parents=True, exist_ok=True)
        for clip in clips:
            _replace(root / clip.file, _npy(features(clip)))
        _replace(root / MANIFEST, manifest_bytes(clips))
    except OSError as error:
        raise StoreError(f"cannot write the sample under {shown(root)}: {error}") from error
    return len(clips)


def _refuse_foreign(root: Path, names: set[str]) -> None:
    """A directory that is someone's own dataset must not be overwritten, not even in part."""
    if not root.exists():
        return
    if not root.is_dir():
        raise UsageError(f"{shown(root)} is not a directory", hint=_ELSEWHERE)
    there = {path.name for path in root.iterdir()}
    held = {path.name for path in (root / "features").iterdir()} if "features" in there else set()
    foreign = sorted(there - _BESIDE) + [f"features/{name}" for name in sorted(held - names)]
    if not foreign and MANIFEST in there and not held:
        foreign = [MANIFEST]  # a manifest of other features
    if foreign:
        raise UsageError(
            f"{shown(root)} holds files that are not part of the sample:\n{listed(foreign)}", hint=_ELSEWHERE
        )


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all: a reader never meets half a file."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def manifest_bytes(clips: Iterable[Clip]) -> bytes:
    """The dataset JSON, one row a line, in the shape with lists; ``val`` is empty: validation is cut by location."""
    rows = [(clip.split, json.dumps(_row(clip))) for clip in clips]
    lists = [
        f"{json.dumps(name)}: [" + ",".join(f"\n{row}" for split, row in rows if split == name) + "]" for name in LISTS
    ]
    made = f"{json.dumps(FRONT_END)}: " + json.dumps({"name": "kd-cache sample", "version": VERSION, "n_mels": MELS})
    return ("{" + ",\n".join([made, *lists]) + "}\n").encode("ascii")


def _row(clip: Clip) -> dict[str, str | int]:
    return {
        "file": clip.file,
        "scene_label": DCASE.scenes.index(clip.scene) if clip.is_labelled else NO_LABEL,
        "city_label": DCASE.cities.index(clip.city),
        "domain": DCASE.domain_of[clip.device],
        "device_id": clip.device,
        "split": clip.split,
        "identifier": f"{clip.city}-{clip.location}",
    }


def _npy(array: npt.NDArray[np.float16]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


# What is heard: every part is a function of names, in units of about one standard deviation of a clip.

_TIME = np.arange(FRAMES, dtype=np.float64)[:, None]  # (T, 1)
_BAND = np.arange(MELS, dtype=np.float64)[None, :]  # (1, F)


def _soundscape(clip: Clip) -> Array:
    """The moment itself, before any device: (T, F)."""
    scene, city = DCASE.scenes.index(clip.scene), SAMPLE_CITIES.index(clip.city)
    return (
        0.7 * _scene(scene, clip.moment)
        + _ripple(scene, city, clip.moment)
        + _whistle(city, clip.moment)
        + 0.5 * _smooth_curve(f"location/{clip.city}-{clip.location}")
        + 0.5 * _smooth_curve(f"weather/{clip.moment}")
        + 1.4 * _noise(f"moment/{clip.moment}", FRAMES, MELS)
    )


def _scene(scene: int, moment: str) -> Array:
    """A scene has a spectral envelope, a rhythm in one band, and events that glide and die away."""
    u = _draws(f"scene/{DCASE.scenes[scene]}", 12)
    v = _draws(f"scene-in/{moment}", 12)
    envelope = np.zeros((1, MELS))
    for nth, stride in enumerate((3, 7, 9)):
        height = (0.5 + u[nth]) * (0.2 + 1.6 * v[nth])
        centre = _spread(scene, stride, u[3 + nth], 4, 60) + 4 * v[5 + nth] - 2
        envelope = envelope + height * _bump(_BAND, centre, 5.0)
    rate = _spread(scene, 7, u[6], 1.5, 8)
    beat = _wave(rate * _TIME / FRAMES + v[4]) * _bump(_BAND, 20 + 40 * u[7], 14.0)
    return envelope + (0.2 + 1.2 * v[3]) * beat + _events(scene, u, moment)


def _events(scene: int, u: list[float], moment: str) -> Array:
    """Three sounds of the scene's kind at random times, some loud and some hardly heard."""
    v = _draws(f"events/{moment}", 6)
    total = np.zeros((FRAMES, MELS))
    for nth in range(3):
        since = _TIME - FRAMES * v[nth]
        decay = np.where(since < 0, 0.0, 1 / (1 + np.abs(since) / (1 + 3 * u[8])))
        glide = _spread(scene, 9, u[9], 8, 48) + 2 * (_spread(scene, 3, u[10], 0, 2) - 1) * since
        total = total + (0.2 + 1.8 * v[3 + nth]) * decay * _bump(_BAND, glide, 1 + u[11])
    return total


def _ripple(scene: int, city: int, moment: str) -> Array:
    """A grating over the bands: the scene is how fast it drifts, and city and scene together are its spacing.

    Each spacing is one of ten cities', by the scene: a network that learns to tell cities has to learn how scenes move.
    This is what a City2Scene teacher lives on.
    """
    u = _draws(f"city/{SAMPLE_CITIES[city]}", 1)
    v = _draws(f"ripple-in/{moment}", 3)
    spacing = _spread(3 * city + scene, 1, u[0], 5, 14)
    # Nearly all of its own tenth: neighbouring scenes are hard to tell apart.
    drift = 0.45 * _spread(scene, 9, 0.5 + 0.9 * (v[0] - 0.5), -1, 1)
    return 7 * (0.7 + 0.3 * v[1]) * _wave(_BAND / spacing + drift * _TIME + v[2])


def _whistle(city: int, moment: str) -> Array:
    """A city's narrow steady line, pulsing at the city's rate."""
    u = _draws(f"whistle/{SAMPLE_CITIES[city]}", 2)
    v = _draws(f"whistle-in/{moment}", 2)
    pulse = 1 + _wave(_spread(city, 1, u[0], 2, 9) * _TIME / FRAMES + v[0])
    return 0.5 * (0.2 + v[1]) * pulse * _bump(_BAND, _spread(city, 7, u[1], 6, 58), 1.2)


def _through_device(heard: Array, clip: Clip) -> Array:
    """Filter, compression of loud parts, noise floor, and the device's own noise: more of it where it is unseen."""
    if clip.device == DCASE.source:
        return heard + 0.2 * _noise(f"device/{clip.file}", FRAMES, MELS)
    u = _draws(f"device/{clip.device}", 4)
    filtered = heard + (1 + u[0]) * _smooth_curve(f"response/{clip.device}")
    slope = 0.25 + 0.4 * u[1]
    squeezed = np.where(filtered > 1, 1 + slope * (filtered - 1), filtered)
    floor = 0.8 * u[2] - 0.4
    # A maximum with a soft corner, as noise adds to what is barely louder.
    raised = 0.5 * (squeezed + floor + np.sqrt((squeezed - floor) * (squeezed - floor) + 0.25))
    noise = (2.5 if clip.device in DCASE.unseen else 1) * 0.32 * (1 + u[3])
    return raised + noise * _noise(f"device/{clip.file}", FRAMES, MELS)


def _smooth_curve(name: str) -> Array:
    """A random smooth function of the mel band, about one high: (1, F)."""
    u = _draws(name, 15)
    curve = np.zeros((1, MELS))
    for nth in range(5):
        curve = curve + (2 * u[nth] - 1) * _bump(_BAND, MELS * u[5 + nth], 4 + 10 * u[10 + nth])
    return curve


def _spread(index: int, stride: int, u: float, low: float, high: float) -> float:
    """Class ``index``'s own tenth of ``[low, high)``, in an order that ``stride`` (coprime to ten) shuffles."""
    return float(low + (high - low) * ((index * stride) % 10 + u) / 10)


def _bump(x: Array, centre: Array | float, width: float) -> Array:
    away = (x - centre) / width
    return np.asarray(1 / (1 + away * away))


def _wave(phase: Array) -> Array:
    """A sine of period one, near enough, from two parabolas."""
    p = phase - np.floor(phase)
    return np.where(p < 0.5, 8 * p * (1 - 2 * p), -8 * (p - 0.5) * (2 - 2 * p))


def _draws(name: str, count: int) -> list[float]:
    return [float(value) for value in _uniform(name, count)]


def _noise(name: str, *shape: int) -> Array:
    """Nearly Gaussian noise of variance one: four uniforms summed."""
    u = _uniform(name, 4 * math.prod(shape)).reshape(4, *shape)
    noise: Array = (u[0] + u[1] + u[2] + u[3] - 2) * 1.75
    return noise


def _uniform(name: str, count: int) -> Array:
    """``count`` numbers in ``[0, 1)``: the SHAKE-256 stream of the name, four bytes for each."""
    stream = hashlib.shake_256(f"kd-cache sample {VERSION}/{name}".encode()).digest(4 * count)
    return np.frombuffer(stream, dtype="<u4").astype(np.float64) * 2.0**-32
