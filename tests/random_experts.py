"""Templates of mixtures of experts, whose weights are stacked in one parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from random_templates import Step, Template, template
from torch import Tensor, nn

_EXPERTS = 3
_BETWEEN: tuple[Callable[[Tensor], Tensor], ...] = (F.relu, F.silu, lambda h: h.clamp(-1.0, 2.0) * 0.5, torch.sigmoid)
# How experts run.
RUNS = ("batched", "loop", "everywhere", "einsums")


def _fits(step: Step, layout: str, positions: tuple[int, ...], channels: int) -> bool:
    return layout != "images"


@template("experts", _fits)
class Experts(Template):
    """Experts with one layer in front of the activation, or with packed or interleaved gates."""

    def make(self, width: int, inputs: int, outputs: int) -> None:
        front, behind = self.step.biased
        self.parts = 2 if self.step.norm else 1
        self.interleaved = self.step.norm in ("batch", "relu_")
        self.router = nn.Linear(inputs, _EXPERTS)
        self.first = nn.Parameter(torch.randn(_EXPERTS, self.parts * width, inputs))
        self.second = nn.Parameter(torch.randn(_EXPERTS, outputs, width))
        self.first_bias = nn.Parameter(torch.randn(_EXPERTS, self.parts * width)) if front else None
        self.second_bias = nn.Parameter(torch.randn(_EXPERTS, outputs)) if behind else None
        self.between = _BETWEEN[width % len(_BETWEEN)]

    def gated(self, h: Tensor) -> Tensor:
        if self.parts == 1:
            return self.between(h)
        gate, value = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        return self.between(gate) * value

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(rows).softmax(-1).topk(2, dim=-1)
        y = getattr(self, f"_{self.step.experts}")(rows, ids, weights)
        return y.reshape(*(x.shape[i] for i in range(x.ndim - 1)), self.second.shape[1])

    def _batched(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = ids.reshape(-1)
        h = torch.bmm(rows.repeat_interleave(2, dim=0).unsqueeze(1), self.first[chosen].transpose(1, 2)).squeeze(1)
        h = self.gated(h if self.first_bias is None else h + self.first_bias[chosen])
        y = torch.bmm(self.second[chosen], h.unsqueeze(-1)).squeeze(-1)
        y = y if self.second_bias is None else y + self.second_bias[chosen]
        return (y * weights.reshape(-1, 1)).reshape(-1, 2, self.second.shape[1]).sum(1)

    def _loop(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = (rows[:, :1] * 0.0).expand(-1, self.second.shape[1])
        for expert in range(_EXPERTS):
            row, place = torch.where(ids == expert)
            h = rows[row] @ self.first[expert].t()
            h = self.gated(h if self.first_bias is None else h + self.first_bias[expert])
            out = F.linear(h, self.second[expert], None if self.second_bias is None else self.second_bias[expert])
            y = y.index_add(0, row, out * weights[row, place].unsqueeze(-1))
        return y

    def _everywhere(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = rows @ self.first.transpose(1, 2)
        h = self.gated(h if self.first_bias is None else h + self.first_bias.unsqueeze(1))
        y = h @ self.second.transpose(1, 2)
        y = y if self.second_bias is None else y + self.second_bias.unsqueeze(1)
        share = (F.one_hot(ids, _EXPERTS) * weights.unsqueeze(-1)).sum(1)
        return (y * share.t().unsqueeze(-1)).sum(0)

    def _einsums(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = torch.einsum("ni,ehi->neh", rows, self.first)
        h = self.gated(h if self.first_bias is None else h + self.first_bias)
        y = torch.einsum("neh,eoh->neo", h, self.second)
        y = y if self.second_bias is None else y + self.second_bias
        share = (F.one_hot(ids, _EXPERTS) * weights.unsqueeze(-1)).sum(1)
        return (y * share.unsqueeze(-1)).sum(1)
