"""Texts of a file as batches, by the tokenizer of a model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vbpfx.data.batches import Data, spread, taken
from vbpfx.errors import CalibrationError, first_line

TEXT_SUFFIXES = (".txt", ".jsonl")
_USUAL_LENGTH = 512  # tokens, unless asked for more: what is longer is cut
_LIMITS = ("max_position_embeddings", "n_positions", "max_source_positions")


def _read_texts(path: Path) -> tuple[list[str], list[int] | None]:
    """The texts of a file, and their labels where all have one.

    A line of a ``.txt`` is a text; a line of a ``.jsonl`` is an object with a ``text`` and perhaps a ``label``, a number.
    Empty lines do not count.

    Raises:
        CalibrationError: the file cannot be read, or holds no text.
    """
    try:
        lines = [
            (n, line)
            for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path} as text: {error}") from error
    if not lines:
        raise CalibrationError(f"{path} is empty: expected a text on each line")
    if path.suffix == ".txt":
        return [line.strip() for _, line in lines], None
    rows = [_row(path, number, line) for number, line in lines]
    labels: list[Any] = [row.get("label") for row in rows]
    return [row["text"] for row in rows], labels if all(type(label) is int for label in labels) else None


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise CalibrationError(f'{path}, line {number}: expected an object with a "text", found {line[:60]}')
    return row


@dataclass(frozen=True)
class _Tokens:
    """From texts to the arguments of a Hugging Face model: token numbers, padded to the longest, and their mask.

    Attributes:
        tokenizer: the model's own.
        names: the arguments that the model takes.
        length: tokens after which a text is cut.
    """

    tokenizer: Any
    names: frozenset[str]
    length: int

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The arguments of one batch."""
        made = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: tensor for name, tensor in made.items() if name in self.names}


def _tokens_of(model: nn.Module, max_length: int | None) -> _Tokens:
    """The tokenizer in the folder that the model was loaded from.

    Raises:
        CalibrationError: there is none, or the model takes no tokens.
    """
    folder, config = getattr(model, "name_or_path", None), getattr(model, "config", None)
    if config is None or not folder or getattr(model, "main_input_name", None) != "input_ids":
        raise CalibrationError(
            f"text is read for Hugging Face models that were loaded from a folder (hf:FOLDER); for this {type(model).__name__} "
            f"pass its tokens as arrays: an .npz with one for each argument"
        )
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up from the configuration alone
            raise OSError("there are no words in it")
    except Exception as error:  # the hub, the files and the packages behind a tokenizer raise what they raise
        raise CalibrationError(
            f"{folder} holds no tokenizer that can be loaded ({first_line(error)}); save it beside the model with "
            f"tokenizer.save_pretrained, or pass tokens as arrays: an .npz with input_ids and attention_mask"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise CalibrationError(
                f"the tokenizer in {folder} has no token to pad with; set its pad_token and save it again"
            )
    limits = [value for name in _LIMITS if isinstance(value := getattr(config, name, None), int)]
    limit = min([tokenizer.model_max_length, *limits])
    length = min(limit, _USUAL_LENGTH) if max_length is None else max_length
    if not 1 <= length <= limit:
        raise CalibrationError(f"max_length={max_length}: this model takes from 1 to {limit} tokens")
    return _Tokens(tokenizer, frozenset(inspect.signature(model.forward).parameters), length)


@dataclass(frozen=True)
class _Texts(Dataset[Any]):
    texts: tuple[str, ...]
    labels: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> Any:
        return self.texts[number] if self.labels is None else (self.texts[number], self.labels[number])


@dataclass(frozen=True)
class _Tokenised:
    """From texts to a batch of their tokens, with their labels where there are any."""

    tokens: Callable[[Sequence[str]], dict[str, Tensor]]

    def __call__(self, samples: list[Any]) -> Any:
        if isinstance(samples[0], str):
            return self.tokens(samples)
        return self.tokens([text for text, _ in samples]), torch.tensor([label for _, label in samples])


def open_texts(path: Path, model: nn.Module, max_length: int | None, limit: int | None, seed: int, batch: int) -> Data:
    """The texts of a file; arguments as :func:`vbpfx.open_data` takes them.

    Raises:
        CalibrationError: the file holds none, or the model has no tokenizer.
    """
    texts, known = _read_texts(path)
    tokens = _tokens_of(model, max_length)
    chosen = sorted(spread(known, len(texts), seed)[:limit])
    labels = None if known is None else tuple(known[number] for number in chosen)
    about = (f"{taken(len(chosen), len(texts), 'text')} from {path}, at most {tokens.length} tokens each",)
    dataset = _Texts(tuple(texts[number] for number in chosen), labels)
    return Data(path, len(chosen), labels, None, (), about, batch, 0, dataset, _Tokenised(tokens))
