"""Read the texts of a file as batches of tokens, made by the model's tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vbpfx.data.batches import Data, spread, taken
from vbpfx.data.decoder import shift_of
from vbpfx.data.inputs import Labelled
from vbpfx.data.reader import DataReader, ReadOptions
from vbpfx.errors import CalibrationError, first_line

_USUAL_LENGTH = 512  # tokens; by default, longer texts are cut
_LIMITS = ("max_position_embeddings", "n_positions", "max_source_positions")


@dataclass(frozen=True)
class _File:
    """The texts of a file. Labels and target texts are None unless every text has one."""

    texts: Sequence[str]
    labels: Sequence[int] | None = None
    targets: Sequence[str] | None = None


def _read_texts(path: Path) -> _File:
    """Read the texts of a file.

    Each line of a ``.txt`` is a text. Each line of a ``.jsonl`` is an object with a ``text`` and, optionally, a
    ``label`` (a number) or a ``target`` (a text). Empty lines are skipped.

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
        return _File([line.strip() for _, line in lines])
    rows = [_row(path, number, line) for number, line in lines]

    def where_all_have_one(name: str, kind: type) -> list[Any] | None:
        found = [row.get(name) for row in rows]
        return found if all(type(value) is kind for value in found) else None

    return _File([row["text"] for row in rows], where_all_have_one("label", int), where_all_have_one("target", str))


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{path}, line {number} is not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise CalibrationError(f'{path}, line {number}: expected an object with a "text", found {line[:60]}')
    return row


@dataclass(frozen=True)
class _Tokens:
    """Converts texts to the arguments of a Hugging Face model: token ids, padded to the longest text, and their mask.

    Attributes:
        tokenizer: the model's own tokenizer.
        names: the names of the arguments that the model takes.
        length: the number of tokens after which a text is cut.
        shift: for an encoder-decoder model: converts the tokens of target texts to the decoder's input, by shifting
            them by one position.
    """

    tokenizer: Any
    names: frozenset[str]
    length: int
    shift: Callable[[Tensor], Tensor] | None = None

    def __call__(self, texts: Sequence[str], targets: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the arguments for one batch."""
        arguments = {name: tensor for name, tensor in self._made(list(texts)).items() if name in self.names}
        if self.shift is not None:
            arguments["decoder_input_ids"] = self.shift(self._made(text_target=list(targets))["input_ids"])
        return arguments

    def _made(self, *texts: list[str], **targets: list[str]) -> Mapping[str, Tensor]:
        made: Mapping[str, Tensor] = self.tokenizer(
            *texts,
            **targets,
            padding=True,
            truncation=True,
            max_length=self.length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return made


def _tokens_of(model: nn.Module, max_length: int | None) -> _Tokens:
    """Load the tokenizer from the folder that the model was loaded from.

    Raises:
        CalibrationError: there is no tokenizer, or the model does not take tokens.
    """
    folder, config = getattr(model, "name_or_path", None), getattr(model, "config", None)
    if config is None or not folder or getattr(model, "main_input_name", None) != "input_ids":
        raise CalibrationError(
            f"text is read for Hugging Face models that were loaded from a folder (hf:FOLDER); for this {type(model).__name__} "
            f"pass its tokens as arrays: an .npz with one for each argument"
        )
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Without files, transformers makes a tokenizer from the configuration alone, with only special tokens.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise OSError("its vocabulary has only special tokens")
    except Exception as error:  # loading a tokenizer may raise any exception
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
    names = frozenset(inspect.signature(model.forward).parameters)
    answers = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names
    shift = shift_of(model) if answers else None
    if answers and shift is None:
        raise CalibrationError(
            f"{type(model).__name__} has no rule for making its decoder's input from the answers in the data. Pass the tokens as arrays instead: an .npz with input_ids, attention_mask and decoder_input_ids"
        )
    return _Tokens(tokenizer, names, length, shift)


@dataclass(frozen=True)
class _Texts(Dataset[Any]):
    """A dataset of tuples: a text, and its target text or label if it has one."""

    columns: tuple[tuple[Any, ...], ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, number: int) -> Any:
        return tuple(column[number] for column in self.columns)


@dataclass(frozen=True)
class _Tokenised:
    """Collates texts into a batch of tokens, with their labels if there are any."""

    tokens: _Tokens

    def __call__(self, samples: list[Any]) -> Any:
        texts, *behind = zip(*samples, strict=True)
        if self.tokens.shift is not None:
            return self.tokens(texts, behind[0])
        return Labelled(self.tokens(texts), torch.tensor(behind[0])) if behind else self.tokens(texts)


def _read(path: Path, model: nn.Module, how: ReadOptions) -> Data:
    """Read the texts of a file.

    Raises:
        CalibrationError: the file holds no texts, or the model has no tokenizer.
    """
    read, tokens = _read_texts(path), _tokens_of(model, how.max_length)
    known = None if tokens.shift else read.labels
    if tokens.shift and read.targets is None:
        raise CalibrationError(
            f'{path}: {type(model).__name__} is an encoder-decoder model; pass a .jsonl in which each line has a "text" and its '
            f'answer as "target"'
        )
    chosen = sorted(spread(known, len(read.texts), how.seed)[: how.limit])
    labels = None if known is None else tuple(known[number] for number in chosen)
    behind = read.targets if tokens.shift else known
    columns = [tuple(column[number] for number in chosen) for column in (read.texts, behind) if column is not None]
    about = (f"{taken(len(chosen), len(read.texts), 'text')} from {path}, at most {tokens.length} tokens each",)
    return Data(path, len(chosen), labels, None, (), about, how.batch, 0, _Texts(tuple(columns)), _Tokenised(tokens))


READER = DataReader(
    about="a text file (.txt, .jsonl)",
    read=_read,
    suffixes=(".txt", ".jsonl"),
    options=("max_length",),
)
