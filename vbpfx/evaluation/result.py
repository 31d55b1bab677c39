"""The result of an evaluation, as figures and as tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from vbpfx.display.figures import MINUS
from vbpfx.display.tables import counted, table
from vbpfx.evaluation.intervals import Mean, PairedDifference, Share

_FEW = 10  # with fewer samples per class, the change of a single class says little


@dataclass(frozen=True)
class Accuracy:
    """How often a network is right.

    Attributes:
        top1: the share of samples whose label has the largest logit.
        top5: the share of samples whose label is among the five largest logits; None for five classes or fewer.
    """

    top1: Share
    top5: Share | None


@dataclass(frozen=True)
class ClassChange:
    """How pruning changed one class.

    Attributes:
        label: the number of the class.
        name: the name of the class.
        samples: the number of its samples.
        dense, pruned: how many of these samples each network classifies correctly.
    """

    label: int
    name: str
    samples: int
    dense: int
    pruned: int


@dataclass(frozen=True)
class Evaluation:
    """The comparison of a dense and a pruned network on the same samples. Printing it shows tables.

    Attributes:
        samples: the number of samples.
        dense, pruned: how often each network is right. Both are None without labels; ``pruned`` is also None if no
            pruned network was evaluated.
        top1_change, top5_change: the change of accuracy by pruning, on the same samples; None without both accuracies.
        agreement: the share of samples for which both networks choose the same class. For networks that choose a class
            at every position it is the mean over samples of the share of positions. None without a pruned network.
        kl: mean KL divergence of the pruned network's probabilities from the dense network's, in nats.
        classes: the change of every class; the classes that lost most come first.
        by_position: whether the networks choose a class at every position of a sample.
        cosine: for outputs that are not logits, the mean cosine between the two networks' values.
        relative_error: for outputs that are not logits, the root of the summed squared differences divided by the
            summed squares of the dense network's values.
    """

    samples: int
    dense: Accuracy | None
    pruned: Accuracy | None
    top1_change: PairedDifference | None
    top5_change: PairedDifference | None
    agreement: float | None
    kl: float | None
    classes: tuple[ClassChange, ...] = field(default=(), repr=False)
    by_position: bool = False
    cosine: Mean | None = None
    relative_error: float | None = None

    @property
    def retention(self) -> float | None:
        """The pruned network's top-1 accuracy divided by the dense one's; None without both accuracies."""
        if self.dense is None or self.pruned is None or not self.dense.top1.count:
            return None
        return self.pruned.top1.count / self.dense.top1.count

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a dictionary that can be written as JSON: shares from 0 to 1, and 95 % intervals."""
        figures: dict[str, Any] = {"samples": self.samples}
        for network in ("dense", "pruned"):
            found: Accuracy | None = getattr(self, network)
            if found is not None:
                figures[network] = {"top1": _share(found.top1), "top5": _share(found.top5)}
        changes = {"top1_change": self.top1_change, "top5_change": self.top5_change}
        figures |= {name: _change(change) for name, change in changes.items() if change is not None}
        others = {
            "retention": self.retention,
            "agreement": self.agreement,
            "kl": self.kl,
            "relative_error": self.relative_error,
        }
        if self.cosine is not None:
            figures["cosine"] = {"mean": self.cosine.value, "interval": list(self.cosine.interval)}
        figures |= {name: value for name, value in others.items() if value is not None}
        if self.classes:
            figures["classes"] = [dataclasses.asdict(entry) for entry in self.classes]
        return figures

    def for_report(self) -> dict[str, Any]:
        """Return the figures in the form that :meth:`vbpfx.Report.measured` takes."""
        figures: dict[str, Any] = {"samples": self.samples}
        if self.dense is not None and self.pruned is not None:
            figures["top-1 accuracy"] = (self.dense.top1.value, self.pruned.top1.value)
            if self.dense.top5 is not None and self.pruned.top5 is not None:
                figures["top-5 accuracy"] = (self.dense.top5.value, self.pruned.top5.value)
        for name, change in (("top-1", self.top1_change), ("top-5", self.top5_change)):
            if change is not None:
                low, high = (f"{100 * end:+.2f}".replace("-", MINUS) for end in change.interval)
                figures[f"95% confidence interval, {name}"] = f"{low} to {high} points"
        if self.agreement is not None:
            figures["agreement with the dense network"] = self.agreement
            figures["KL divergence from the dense network"] = f"{self.kl:.4g} nats"
        if self.cosine is not None:
            figures["cosine with the dense network's output"] = _cosine(self.cosine)
            figures["relative error of the output"] = f"{self.relative_error:.4g}"
        return figures

    def __str__(self) -> str:
        return self.text()

    def text(self, worst: int = 10) -> str:
        """Return the tables that printing shows.

        Args:
            worst: how many of the classes that lost most to list.
        """
        text = ""
        if self.dense is not None:
            text += self._accuracies(self.dense)
        if self.agreement is not None:
            text += f"both choose the same class: {self.agreement:.1%}{self._agreement_interval()}\n"
            text += f"mean KL divergence from the dense network: {self.kl:.4g} nats\n"
        if self.cosine is not None:
            text += f"cosine with the dense network's output: {_cosine(self.cosine)}\n"
            text += f"relative error of the output: {self.relative_error:.4g}\n"
        if self.retention is not None:
            text += f"retention (pruned top-1 / dense top-1): {self.retention:.1%}\n"
        brackets = "; in brackets 95 % confidence intervals" if "[" in text else ""
        return f"{counted(self.samples, 'sample')}{brackets}\n{text}{self._worst(worst)}"

    def _accuracies(self, dense: Accuracy) -> str:
        rows = []
        for name in ("top1", "top5"):
            shares = [getattr(accuracy, name) for accuracy in (dense, self.pruned) if accuracy is not None]
            change: PairedDifference | None = getattr(self, f"{name}_change")
            if None in shares:
                continue
            points = [] if change is None else [_points(change)]
            rows.append([f"top-{name[3:]}", *map(_percent, shares), *points])
        columns = ("accuracy", "dense", "pruned", "change in points") if self.pruned is not None else ("accuracy", "")
        return table("", columns, rows)

    def _agreement_interval(self) -> str:
        if self.agreement is None or self.by_position:  # a mean over positions is not a share of samples
            return ""
        low, high = Share(round(self.agreement * self.samples), self.samples).interval
        return f" [{low:.1%}, {high:.1%}]"

    def _worst(self, worst: int) -> str:
        if self.pruned is None or not self.classes or not worst:
            return ""
        hurt = [entry for entry in self.classes if entry.pruned < entry.dense]
        if not hurt:
            return "no class lost samples\n"
        rows = [
            (
                entry.name,
                entry.samples,
                entry.dense,
                entry.pruned,
                f"{(entry.pruned - entry.dense) / entry.samples:>+6.0%}",
            )
            for entry in hurt[:worst]
        ]
        gained = sum(entry.pruned > entry.dense for entry in self.classes)
        title = (
            f"Of {counted(len(self.classes), 'class', 'classes')} {len(hurt)} lost and {gained} gained correctly classified samples; "
            f"those that lost most:"
        )
        text = f"{title}\n" + table("", ("class", "samples", "dense right", "pruned right", "change"), rows)
        each = self.samples / len(self.classes)
        if each < _FEW:
            text += f"With {each:.2g} sample{'' if each == 1 else 's'} a class, what one class lost is mostly chance.\n"
        return text


def _cosine(mean: Mean) -> str:
    low, high = mean.interval
    return f"{mean.value:.4f} [{low:.4f}, {high:.4f}]"


def _share(share: Share | None) -> dict[str, Any] | None:
    if share is None:
        return None
    return {"count": share.count, "share": share.value, "interval": list(share.interval)}


def _change(change: PairedDifference) -> dict[str, Any]:
    return {
        "change": change.value,
        "interval": list(change.interval),
        "dense_alone": change.first,
        "pruned_alone": change.second,
    }


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:5.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _points(change: PairedDifference) -> str:
    low, high = change.interval
    return f"{100 * change.value:+5.1f} [{100 * low:+5.1f}, {100 * high:+5.1f}]"
