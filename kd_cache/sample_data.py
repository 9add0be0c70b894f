"""
The embedded sample: a small synthetic soundscape set, laid out as TAU Urban Acoustic Scenes is, but made of arithmetic.

No audio and no third-party data are in it. A clip is a log-mel picture ``[T, F]`` built from what a scene, a city, a
location and one moment contribute, then heard through a device; twins are one moment heard through two devices.

The same bytes come out on every machine: the randomness of a clip is the SHAKE-256 stream of its *name* (never of its
position), arithmetic is float64 addition, multiplication, division and floor, which IEEE 754 rounds in one way only
(no exp, sin or matrix product, whose last bits depend on the CPU), sums are exact (`math.fsum`), and what is stored
is a multiple of 1/64, which float16 holds exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kd_cache.manifest import CITIES, DEVICES, DOMAIN_OF, SCENES, SOURCE, TARGETS

MELS = 64
FRAMES = 31
"""31 frames × 64 bands × 2 bytes and the .npy header of 128 bytes are 4096: a clip fills one disk block exactly."""

SAMPLE_CITIES = tuple(city for city in CITIES if city not in ("amsterdam", "madrid"))
"""The ten cities of the TAU development sets; labels still count in the list of twelve."""
TEST_DEVICES = DEVICES[:7] + DEVICES[7:]
TRAIN_LOCATIONS = 2  # of each city and scene
TEST_LOCATIONS = 1
SEGMENTS = 2  # of each train location
TRAIN_SHARE = 4  # of ten combinations of city and scene, how many a target device recorded
TEST_SHARE = 2

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

    @property
    def file(self) -> str:
        """Its name as TAU would write it, device A in lower case."""
        device = self.device.lower()
        return f"features/{self.scene}-{self.city}-{self.location}-{self.segment}-{device}.npy"

    @property
    def moment(self) -> str:
        """What simultaneous twins share: everything but the device."""
        return f"{self.scene}-{self.city}-{self.location}-{self.segment}"


def sample_clips() -> tuple[Clip, ...]:
    """Every clip of the sample, in manifest order: train before test, device A first, then by device."""
    places = [(scene, city) for scene in SCENES for city in SAMPLE_CITIES]
    train = [clip for device in (SOURCE, *TARGETS) for clip in _train_clips(places, device)]
    test = [clip for device in DEVICES for clip in _test_clips(places, device)]
    return (*train, *test)


def _train_clips(places: list[tuple[str, str]], device: str) -> Iterator[Clip]:
    per_place = TRAIN_LOCATIONS + TEST_LOCATIONS
    for number, (scene, city) in enumerate(places):
        if device == SOURCE:
            for nth in range(TRAIN_LOCATIONS * SEGMENTS):
                location, segment = divmod(nth, SEGMENTS)
                yield Clip(scene, city, number * per_place + location, segment, device, "train")
        elif _recorded(number, device, TRAIN_SHARE):
            location, segment = divmod((number + DOMAIN_OF[device]) % (TRAIN_LOCATIONS * SEGMENTS), SEGMENTS)
            yield Clip(scene, city, number * per_place + location, segment, device, "train")


def _test_clips(places: list[tuple[str, str]], device: str) -> Iterator[Clip]:
    per_place = TRAIN_LOCATIONS + TEST_LOCATIONS
    for number, (scene, city) in enumerate(places):
        for nth in range(TEST_LOCATIONS):
            if device == SOURCE or _recorded(number, device, TEST_SHARE):
                yield Clip(scene, city, number * per_place + TRAIN_LOCATIONS + nth, 0, device, "test")


def _recorded(number: int, device: str, share: int) -> bool:
    """Whether a device other than A was carried to this city and scene; each sees all cities and all scenes."""
    scene, city = divmod(number, len(SAMPLE_CITIES))
    return (scene + city + 3 * DOMAIN_OF[device]) % 10 < share


def features(clip: Clip) -> npt.NDArray[np.float16]:
    """The clip's log-mel picture, z-scored, ``[T, F]``."""
    heard = _through_device(_soundscape(clip), clip)
    values = heard.ravel().tolist()
    mean = math.fsum(values) / len(values)
    centred = heard - mean
    variance = math.fsum((centred * centred).ravel().tolist()) / len(values)
    score = centred / math.sqrt(variance)
    return (np.clip(np.rint(score / _STEP) * _STEP, -_CLIP_AT, _CLIP_AT)).astype("<f2")


# What is heard: every part is a function of names, in units of about one standard deviation of a clip.

_TIME = np.arange(FRAMES, dtype=np.float64)[:, None]  # (T, 1)
_BAND = np.arange(MELS, dtype=np.float64)[None, :]  # (1, F)


def _soundscape(clip: Clip) -> Array:
    """The moment itself, before any device: (T, F)."""
    scene, city = SCENES.index(clip.scene), SAMPLE_CITIES.index(clip.city)
    return (
        P["scene"] * _scene(scene, city, clip.moment)
        + P["city"] * _city(city, scene, clip.moment)
        + P["loc"] * _smooth_curve(f"location/{clip.city}-{clip.location}")
        + P["noise"] * _noise(f"moment/{clip.moment}", FRAMES, MELS)
        + P["weather"] * _smooth_curve(f"weather/{clip.moment}")
    )


import os

P = dict(
    scene=1.0,
    city=1.0,
    loc=0.8,
    noise=1.2,
    weather=0.8,
    shift=0.8,
    ripple=1.0,
    line=1.0,
    stretch=0.0,
    env=1.0,
    dev=1.0,
    floor=-1.0,
    slope=0.5,
    drift=0.4,
    jit=1.0,
    rlo=0.2,
    glide=2,
    second=0.8,
    echo=0.8,
    events=1.0,
    dur=3.0,
    ew=1.0,
)
for kv in os.environ.get("P", "").split():
    k, v = kv.split("=")
    P[k] = float(v)


def _scene(scene: int, city: int, moment: str) -> Array:
    """A scene has a spectral envelope, a rhythm in one band, and events that glide and die away."""
    u = _uniform(f"scene/{SCENES[scene]}", 12)
    v = _uniform(f"scene-in/{moment}", 12)
    accent = P["stretch"] * (city - 4.5)
    envelope = np.zeros((1, MELS))
    for nth in range(3):
        height = P["env"] * (0.5 + u[nth]) * (0.2 + 1.6 * v[nth])
        centre = _spread(scene, (3, 7, 9)[nth], u[3 + nth], 4, 60) + accent + 4 * v[5 + nth] - 2
        envelope = envelope + height * _bump(_BAND, centre, 5.0)
    rate = _spread(scene, 7, u[6], 1.5, 8)
    rhythm = (0.2 + 1.2 * v[3]) * _wave(rate * _TIME / FRAMES + v[4]) * _bump(_BAND, 20 + 40 * u[7], 14.0)
    return envelope + rhythm + _events(scene, city, u, moment)


def _events(scene: int, city: int, u: Array, moment: str) -> Array:
    v = _uniform(f"events/{moment}", 10)
    w = _uniform(f"accent/{SAMPLE_CITIES[city]}", 4)
    second = _spread(city, 3, w[0], 4, 16)
    echo = _spread(city, 7, w[1], 2, 9)
    total = np.zeros((FRAMES, MELS))
    for nth in range(3):
        loud = 0.2 + 1.8 * v[3 + nth]
        slope = P["glide"] * (_spread(scene, 3, u[10], 0, 2) - 1)
        for again in range(2):
            since = _TIME - FRAMES * v[nth] - again * echo
            decay = np.where(since < 0, 0.0, 1 / (1 + np.abs(since) / (1 + P["dur"] * u[8])))
            glide = _spread(scene, 9, u[9], 8, 48) + slope * since
            voice = _bump(_BAND, glide, 1 + P["ew"] * u[11]) + P["second"] * _bump(
                _BAND, glide + second, 1 + P["ew"] * u[11]
            )
            total = total + (1 - again * (1 - P["echo"])) * loud * decay * voice
    return P["events"] * total


def _city(city: int, scene: int, moment: str) -> Array:
    """A city's ripple and its pulsing whistle; both are displaced by the scene, so neither is heard without it."""
    u = _uniform(f"city/{SAMPLE_CITIES[city]}", 4)
    v = _uniform(f"city-in/{moment}", 5)
    period = _spread(city, 3, u[0], 5, 14)
    ripple = (
        P["ripple"]
        * (P["rlo"] + (1 - P["rlo"]) * v[0])
        * _wave(_BAND / period + P["drift"] * (_spread(scene, 9, 0.5 + P["jit"] * (v[2] - 0.5), -1, 1)) * _TIME + v[3])
    )
    line = _spread(city, 7, u[1], 6, 52) + P["shift"] * scene
    pulse = 1 + _wave(_spread(city, 1, u[2], 2, 9) * _TIME / FRAMES + v[1])
    return ripple + P["line"] * (0.2 + 1.0 * v[4]) * pulse * _bump(_BAND, line, 1.2)


def _through_device(heard: Array, clip: Clip) -> Array:
    """Filter, compression of loud parts, noise floor, and the device's own noise."""
    if clip.device == SOURCE:
        return heard + 0.2 * _noise(f"device/{clip.file}", FRAMES, MELS)
    u = _uniform(f"device/{clip.device}", 4)
    filtered = heard + P["dev"] * (0.8 + 0.6 * u[0]) * _smooth_curve(f"response/{clip.device}")
    slope = P["slope"] + 0.4 * u[1]
    squeezed = np.where(filtered > 1, 1 + slope * (filtered - 1), filtered)
    floor = P["floor"] + 0.8 * u[2]
    raised = 0.5 * (squeezed + floor + np.sqrt((squeezed - floor) * (squeezed - floor) + 0.25))
    return raised + (0.2 + 0.2 * u[3]) * _noise(f"device/{clip.file}", FRAMES, MELS)


def _smooth_curve(name: str) -> Array:
    """A random smooth function of the mel band, about one high: (1, F)."""
    u = _uniform(name, 15)
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


def _noise(name: str, *shape: int) -> Array:
    """Nearly Gaussian noise of variance one: four uniforms summed."""
    u = _uniform(name, 4 * math.prod(shape)).reshape(4, *shape)
    return (u[0] + u[1] + u[2] + u[3] - 2) * 1.75


def _uniform(name: str, count: int) -> Array:
    """``count`` numbers in ``[0, 1)``: the SHAKE-256 stream of the name, four bytes for each."""
    stream = hashlib.shake_256(f"kd-cache sample 1/{name}".encode()).digest(4 * count)
    return np.frombuffer(stream, dtype="<u4").astype(np.float64) * 2.0**-32
