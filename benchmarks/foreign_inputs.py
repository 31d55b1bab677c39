"""Generate inputs for other authors' networks: lines and pages of rendered text, speech, files.

Everything is drawn from seeds. Calibration and test data never share a text, a sentence or a file. Texts are docstrings of the
running Python (:mod:`sentences`), and fonts are those that matplotlib ships, so the inputs differ between machines.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import sentences
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.signal import resample_poly

Array = npt.NDArray[Any]

LINE = (48, 320)  # height and width of a line's image
PAGE = 640  # height and width of a page's image
CROP = 224
RATE = 16_000
CLIP = 144_160  # sound samples per clip, 9.01 s
_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
_MEAN, _SPREAD = (np.array(x, np.float32)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def fonts() -> list[Path]:
    """Return the text fonts that matplotlib ships."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(p for p in folder.glob("*.ttf") if p.stem.split("-")[0] in _FONTS or p.stem.startswith("STIXGeneral"))


def phrases(texts: Sequence[str], count: int, random: np.random.Generator) -> list[str]:
    """Draw distinct phrases of two to four consecutive words made of letters, digits and common punctuation."""
    found: dict[str, None] = {}
    for text in texts:
        words = text.split()
        start = int(random.integers(0, max(1, len(words) - 4)))
        phrase = " ".join(words[start : start + int(random.integers(2, 5))])
        if 4 <= len(phrase) <= 20 and phrase.isascii():
            found[phrase] = None
    return list(found)[:count]


def _colours(random: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw colours for ink and paper, one dark and one light."""
    dark, light = random.integers(0, 90, 3), random.integers(170, 256, 3)
    both = [tuple(int(c) for c in dark), tuple(int(c) for c in light)]
    return (both[0], both[1]) if random.random() < 0.8 else (both[1], both[0])


def _worn(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Add a little blur and noise, as a camera does."""
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 0.9))))
    noisy = np.asarray(image, np.float32) + random.normal(0, random.uniform(0, 12), (*image.size[::-1], 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def line(text: str, random: np.random.Generator) -> Image.Image:
    """Render a line of text, upright and cropped as a text detector would."""
    font = ImageFont.truetype(str(random.choice(np.array(fonts(), dtype=object))), int(random.integers(24, 44)))
    left, top, right, bottom = font.getbbox(text)
    margin = [int(m) for m in random.integers(2, 9, 4)]
    ink, paper = _colours(random)
    size = (int(right - left) + margin[0] + margin[1], int(bottom - top) + margin[2] + margin[3])
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).text((margin[0] - left, margin[2] - top), text, font=font, fill=ink)
    turned = image.rotate(float(random.uniform(-1.5, 1.5)), Image.Resampling.BICUBIC, expand=False, fillcolor=paper)
    return _worn(turned, random)


def as_line(image: Image.Image, size: tuple[int, int]) -> Array:
    """Return the input of the text recogniser, (3, height, width).

    The image is scaled to the height, with values from -1 to 1, channels in the order BGR, and zeros after its end.
    """
    height, width = size
    scaled = min(width, int(np.ceil(height * image.width / image.height)))
    pixels = np.asarray(image.resize((scaled, height), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1]
    made = np.zeros((3, height, width), np.float32)
    made[:, :, :scaled] = pixels.transpose(2, 0, 1) / 127.5 - 1
    return made


def lines(texts: Sequence[str], count: int, seed: int) -> tuple[list[str], list[Image.Image]]:
    """Return the texts and the images of ``count`` lines that fit without being squeezed."""
    random = np.random.default_rng(seed)
    made: list[tuple[str, Image.Image]] = []
    for text in phrases(texts, 2 * count, random):
        image = line(text, random)
        if len(made) < count and image.width / image.height <= LINE[1] / LINE[0]:
            made.append((text, image))
    if len(made) < count:
        raise RuntimeError(f"only {len(made)} of {count} lines could be made of {len(texts)} texts")
    return [text for text, _ in made], [image for _, image in made]


def page(texts: Sequence[str], random: np.random.Generator) -> Image.Image:
    """Render a page of paragraphs in one font and in random sizes."""
    ink, paper = _colours(random)
    image = Image.new("RGB", (PAGE, PAGE), paper)
    draw = ImageDraw.Draw(image)
    face = str(random.choice(np.array(fonts(), dtype=object)))
    y = int(random.integers(10, 60))
    for text in texts:
        font = ImageFont.truetype(face, int(random.integers(14, 34)))
        x, words = int(random.integers(10, 80)), text.split()
        step = int(font.size * random.uniform(1.2, 1.8))
        while words and y + step < PAGE - 10:
            count = next(
                (n for n in range(len(words), 0, -1) if x + font.getlength(" ".join(words[:n])) < PAGE - 10), 1
            )
            draw.text((x, y), " ".join(words[:count]), font=font, fill=ink)
            words, y = words[count:], y + step
        y += step
    return _worn(image, random)


def pages(texts: Sequence[str], count: int, seed: int) -> list[Image.Image]:
    """Render ``count`` pages, each from texts of its own."""
    random, each = np.random.default_rng(seed), len(texts) // count
    return [page(texts[i * each : (i + 1) * each], random) for i in range(count)]


def as_page(image: Image.Image) -> Array:
    """Return the input of the text detector, (3, PAGE, PAGE): values from -1 to 1, channels in the order BGR."""
    return np.ascontiguousarray(np.asarray(image, np.float32)[:, :, ::-1].transpose(2, 0, 1)) / 127.5 - 1


def as_crop(image: Image.Image) -> Array:
    """Return the centre crop, (3, 224, 224), of the image scaled to a short side of 256.

    It is normalised as for ImageNet, with channels in the order BGR.
    """
    share = 256 / min(image.size)
    scaled = image.resize([round(side * share) for side in image.size], Image.Resampling.LANCZOS)
    left, top = ((side - CROP) // 2 for side in scaled.size)
    pixels = np.asarray(scaled.crop((left, top, left + CROP, top + CROP)), np.float32)[:, :, ::-1]
    return (pixels.transpose(2, 0, 1) / 255 - _MEAN) / _SPREAD


class Voice:
    """The speech synthesiser espeak-ng, from the package ``espeakng-loader``."""

    _SYNCHRONOUS, _UTF8 = 2, 1

    def __init__(self, folder: Path) -> None:
        place = folder / "espeakng_loader"
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        self._library = ctypes.CDLL(str(next(place.glob(f"*espeak-ng{suffix}"))))
        self._rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, str(place).encode(), 0)
        if self._rate <= 0:
            raise RuntimeError("espeak-ng does not start")
        self._heard: list[Array] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._hear)
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> Array:
        """Speak a text: RATE samples per second, between -1 and 1."""
        self._heard.clear()
        self._library.espeak_SetVoiceByName(voice.encode())
        self._library.espeak_SetParameter(1, speed, 0)
        self._library.espeak_SetParameter(3, pitch, 0)
        said = text.encode()
        self._library.espeak_Synth(said, len(said) + 1, 0, 1, 0, self._UTF8, None, None)
        if not self._heard:
            raise RuntimeError(f"espeak-ng says nothing for {text!r}")
        sound = np.concatenate(self._heard).astype(np.float64) / 2**15
        return resample_poly(sound, RATE, self._rate)


_VOICES = ("en", "en+f2", "en+m3", "en+f4", "en-us", "en-us+f1", "en-us+m7", "en+m1")


def speech(voice: Voice, texts: Sequence[str], count: int, seed: int) -> Array:
    """Return clips of spoken text, (count, CLIP), most of them damaged as by telephone lines.

    The damage is noise, clipping, a telephone's band with hum, or lost packets.
    """
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        spoken: Array = np.zeros(0)
        words = iter(texts[number::count])
        chosen = (str(random.choice(_VOICES)), int(random.integers(130, 210)), int(random.integers(30, 75)))
        while len(spoken) < CLIP:
            text = next(words, texts[number])
            spoken = np.concatenate([spoken, voice.say(text, *chosen), np.zeros(int(random.integers(1000, 8000)))])
        made.append(_damaged(spoken[:CLIP] * random.uniform(0.3, 1.0), random))
    return np.stack(made).astype(np.float32)


def _damaged(sound: Array, random: np.random.Generator) -> Array:
    kind = int(random.integers(0, 5))
    if kind == 1:  # noise, white to brown
        noise = np.fft.rfft(random.standard_normal(len(sound)))
        noise /= np.arange(1, len(noise) + 1) ** random.uniform(0, 0.8)
        made = np.fft.irfft(noise, len(sound))
        sound = sound + made / made.std() * sound.std() * 10 ** (-random.uniform(0, 25) / 20)
    elif kind == 2:  # clipping
        limit = np.quantile(np.abs(sound), random.uniform(0.8, 0.98))
        sound = sound.clip(-limit, limit)
    elif kind == 3:  # a telephone's frequency band, and hum
        tones = np.fft.rfft(sound)
        frequencies = np.fft.rfftfreq(len(sound), 1 / RATE)
        tones[(frequencies > random.uniform(2000, 4000)) | (frequencies < 250)] = 0
        hum = np.sin(2 * np.pi * 50 * np.arange(len(sound)) / RATE)
        sound = np.fft.irfft(tones, len(sound)) + 0.2 * sound.std() * hum * random.random()
    elif kind == 4:  # packets of 20 ms are lost
        lost = np.repeat(random.random(len(sound) // 320 + 1) < random.uniform(0.02, 0.3), 320)[: len(sound)]
        sound = np.where(lost, 0, sound)
    return sound / max(1.0, float(np.abs(sound).max()))


def spectra(clip: Array) -> Array:
    """Return the spectrum that PLCMOS reads, (1, frames, 257).

    It is log|STFT|^2 / 20 with windows of 512 samples, hops of 256, and silence at -120 dB.
    """
    frames = -(-(len(clip) + 256) // 256)
    padded = np.zeros((frames - 1) * 256 + 512)
    padded[256 : 256 + len(clip)] = clip
    rows = np.lib.stride_tricks.sliding_window_view(padded, 512)[::256]
    power = np.abs(np.fft.rfft(rows * np.hamming(513)[:-1], 512)) ** 2
    floor = power[power > 0].min() * 10**-12
    return (np.log(np.maximum(power, floor)) / 20).astype(np.float32)[None]


def files(count: int, *, test: bool) -> Array:
    """Return files of the running Python as magika reads them, (count, 2048).

    A row holds the first and the last 1,024 bytes of a file, and 256 in place of missing bytes. Kinds of files are told by the
    suffix of the name and are drawn evenly. Every third file is for testing.
    """
    kinds: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for root in {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "include")}:
        for file in root.rglob("*"):
            if file.is_file() and file.suffix and 64 <= file.stat().st_size <= 1 << 22:
                number = int.from_bytes(hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()[:8], "big")
                if (number % 3 == 0) == test:
                    kinds[file.suffix].append((number, file))
    ordered = [sorted(found) for _, found in sorted(kinds.items())]
    turns = [found[turn] for turn in range(max(map(len, ordered))) for found in ordered if turn < len(found)]
    return np.stack([_bytes(file) for _, file in turns[:count]])


def _bytes(file: Path) -> Array:
    data = file.read_bytes()
    first, last = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
    padding = ([256] * (1024 - len(part)) for part in (first, last))
    return np.array([*first, *next(padding), *next(padding), *last], np.int32)


def texts(calibration: int, test: int) -> tuple[list[str], list[str]]:
    """Return docstrings for calibration and docstrings for testing, from different files."""
    return sentences.docstrings(calibration, test)
