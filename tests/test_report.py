"""Reports: spectra against variances that NumPy computes from activations, and loading from JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import HOSTILE, LATER, parse, two
from torch import Tensor, nn

import vbpfx
from vbpfx.calibration.moments import Moments
from vbpfx.display.tables import table
from vbpfx.errors import ArtifactError, ExportError
from vbpfx.planning.importance import Scoring
from vbpfx.report.page import html_report, update_report
from vbpfx.report.report import Report
from vbpfx.report.spectrum import reduced, spectra


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 8, generator=generator) for _ in range(3)]


def test_names_stand_in_tables_as_they_are() -> None:
    """Class names come from folder names, which rich could read as styles, closing tags, or emoji."""
    names = ("[other]", "[/b]", "a:cat:b")
    shown = table("[bold] title", ("name",), [(name,) for name in names])
    assert all(name in shown for name in ("[bold] title", *names))


@pytest.fixture(scope="module")
def pruned() -> vbpfx.Pruned:
    torch.manual_seed(0)
    return vbpfx.prune(two(), data(), ratio=0.4, progress=False)


def variances(model: nn.Module, name: str) -> np.ndarray[Any, Any]:
    """Return the variances of the hidden activations by NumPy, from the model's own first layer and activation."""
    seen: list[Tensor] = []
    hidden = getattr(model, name)[1]
    handle = hidden.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    with torch.no_grad():
        for batch in data():
            model(batch)
    handle.remove()
    return np.asarray(torch.cat(seen).double().numpy().var(axis=0, ddof=1))


@pytest.mark.parametrize("name", [HOSTILE, "plain"])
def test_a_spectrum_is_the_sorted_variances_and_marks_what_the_plan_keeps(pruned: vbpfx.Pruned, name: str) -> None:
    spectrum = pruned.report.spectra[name]
    found = variances(pruned.captured.reference, name)
    kept = next(set(entry.kept) for entry in pruned.plan.blocks if entry.block.name == name)
    order = sorted(range(len(found)), key=lambda i: -found[i])
    n, entries = len(found), len(spectrum.variances)
    assert entries == min(n, 200)
    assert spectrum.neurons == n
    # Divide the ranks into equal shares, in integer arithmetic.
    owner = [next(e for e in range(entries) if (e + 1) * n // entries > rank) for rank in range(n)]
    for entry in range(entries):
        members = [order[rank] for rank in range(n) if owner[rank] == entry]
        assert spectrum.kept[entry] == len(kept & set(members))
        # Statistics are float32 sums of 192 rows, and the report rounds to four digits.
        assert any(spectrum.variances[entry] == pytest.approx(found[i], rel=1e-3, abs=1e-12) for i in members)
    assert spectrum.variances[0] == pytest.approx(found.max(), rel=1e-3)
    assert spectrum.variances[-1] == pytest.approx(found.min(), rel=1e-3, abs=1e-12)
    assert sum(spectrum.kept) == len(kept)
    assert spectrum.among_highest == len(kept & set(order[: len(kept)]))
    assert spectrum.variance_kept == pytest.approx(found[sorted(kept)].sum() / found.sum(), rel=1e-3)


def test_variance_alone_keeps_the_highest_of_every_block() -> None:
    pruned = vbpfx.prune(two(), data(), ratio=0.4, method="vbp", progress=False)
    for name, spectrum in pruned.report.spectra.items():
        assert spectrum.among_highest == sum(spectrum.kept) == pruned.report.widths[name][1]


def test_a_block_left_out_is_not_in_the_spectra() -> None:
    pruned = vbpfx.prune(two(), data(), ratio=0.4, exclude="plain*", progress=False)
    assert {HOSTILE, "plain"} < set(pruned.report.widths)
    assert set(pruned.report.spectra) == {HOSTILE}
    assert pruned.report.arguments == {"ratio": 0.4, "exclude": "plain*"}


def smallest_first(about: Scoring) -> Tensor:
    return -torch.arange(about.block.width, dtype=torch.float64)


def test_arguments_are_what_differs_from_the_defaults() -> None:
    given = {"ratio": 0.4, "criterion": smallest_first, "include": ("plain*",), "memory": 8.0, "refit": False}
    report = vbpfx.prune(two(), data(), progress=False, **given).report
    assert report.arguments == {"ratio": 0.4, "criterion": "smallest_first", "include": ["plain*"], "refit": False}
    code = parse(html_report(report)).text
    assert "    criterion=smallest_first,\n    include=['plain*'],\n    refit=False,\n)" in code


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_few_equal_or_dead_neurons_have_a_spectrum(values: list[float]) -> None:
    spectrum = reduced(torch.tensor(values, dtype=torch.float64), tuple(range(len(values))))
    assert spectrum.variances == tuple(values)
    assert spectrum.kept == (1,) * len(values)
    assert (spectrum.among_highest, spectrum.variance_kept) == (len(values), 1.0)


def test_of_equal_variances_those_that_stay_rank_first() -> None:
    """Ties are broken by index: later neurons are kept."""
    spectrum = reduced(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64), (2, 3, 4))
    assert spectrum.variances == (2.0, 2.0, 2.0, 1.0, 1.0)
    assert spectrum.kept == (1, 1, 0, 1, 0)
    assert spectrum.among_highest == 2
    alike = reduced(torch.zeros(5, dtype=torch.float64), (3, 4))
    assert (alike.kept, alike.among_highest) == ((1, 1, 0, 0, 0), 2)


def test_a_report_comes_back_from_its_file(pruned: vbpfx.Pruned, tmp_path: Path) -> None:
    evaluation = {"top-1 accuracy": (0.75, 0.7), "samples": 100}
    pruned.save(tmp_path, evaluation=evaluation, command="vbpfx prune x")
    report = Report.load(tmp_path)
    assert report == pruned.report.measured(evaluation=evaluation, command="vbpfx prune x")
    assert report.evaluation == {"top-1 accuracy": [0.75, 0.7], "samples": 100}
    assert report.command == "vbpfx prune x"
    assert report.refusals == pruned.analysis.refusals
    assert set(report.versions) == {"vbpfx", "torch", "Python", "platform"}
    # Counted by hand: 8 -> h -> b -> k -> 8 in float32 with biases, where b is a block, too.
    h, b, k = (now for _, now in report.widths.values())
    sizes = [4 * (9 * h + (h + 1) * b + (b + 1) * k + (k + 1) * 8) for h, b, k in ((48, 8, 300), (h, b, k))]
    assert report.size == tuple(sizes)


def test_reports_of_older_versions_load(pruned: vbpfx.Pruned) -> None:
    old = {key: value for key, value in json.loads(json.dumps(pruned.report.to_json())).items() if key not in LATER}
    old.pop("latency")
    report = Report.from_json(old)
    assert report.widths == pruned.report.widths
    assert (report.size, dict(report.spectra), report.refusals) == (None, {}, ())


@pytest.mark.parametrize(
    "damage",
    [
        {"params": [1]},
        {"widths": 3},
        {"verification": {"x": 1}},
        {"spectra": {"a": {}}},
        {"settings": {}},
        {"bench": {"rows": []}},
    ],
)
def test_a_damaged_report_is_an_artifact_error(pruned: vbpfx.Pruned, damage: dict[str, Any]) -> None:
    whole = json.loads(json.dumps(pruned.report.to_json()))
    with pytest.raises(ArtifactError, match="the report is damaged"):
        Report.from_json(whole | damage)
    with pytest.raises(ArtifactError, match="the report is damaged"):
        Report.from_json([])  # type: ignore[arg-type]


def test_what_is_measured_later_joins_the_report(pruned: vbpfx.Pruned, tmp_path: Path) -> None:
    pruned.save(tmp_path, command="vbpfx prune x")
    before = (tmp_path / "model.safetensors").read_bytes()
    report = update_report(tmp_path, evaluation={"agreement": 0.9})
    assert report == Report.load(tmp_path)
    assert (report.evaluation, report.command) == ({"agreement": 0.9}, "vbpfx prune x")
    assert "90.00%" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_evaluation_on_other_data_takes_the_place_of_the_one_before(pruned: vbpfx.Pruned, tmp_path: Path) -> None:
    """Otherwise the accuracy on labelled data would be shown with the name of other data without labels."""
    tuned = dataclasses.replace(pruned.report, tuning="400 samples, 1 epoch", verification=None)
    dataclasses.replace(pruned, report=tuned).save(
        tmp_path, evaluation={"top-1 accuracy": (0.8, 0.7), "samples": 650, "data": "labelled"}
    )
    update_report(tmp_path, evaluation={"agreement": 0.9, "samples": 20, "data": "others"})
    report = Report.load(tmp_path)
    assert report.evaluation == {"agreement": 0.9, "samples": 20, "data": "others"}
    page = (tmp_path / "report.html").read_text()
    assert "Top-1 accuracy" not in page
    assert "Fine-tuned: 400 samples, 1 epoch." in page


@pytest.mark.parametrize("evaluation", [{"accuracy": torch.ones(1)}, {"accuracy": float("nan")}])
def test_an_evaluation_that_is_no_json_leaves_the_files(
    pruned: vbpfx.Pruned, tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    pruned.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for attempt in (
        lambda: update_report(tmp_path, evaluation=evaluation),
        lambda: pruned.save(tmp_path, evaluation=evaluation),
    ):
        with pytest.raises(ArtifactError, match=r"evaluation= cannot be written as JSON"):
            attempt()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_onnx_goes_in_the_same_commit(pruned: vbpfx.Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned.save(tmp_path, onnx=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(before["model.onnx"]) > sum(p.numel() for p in pruned.graph_module.parameters()) * 4
    other = vbpfx.prune(two(), data(), ratio=0.2, progress=False)

    def refuse(*_: Any) -> None:
        raise ExportError("differs")

    monkeypatch.setattr("vbpfx.export.onnx._check_outputs", refuse)
    with pytest.raises(ExportError, match="differs"):
        other.save(tmp_path, onnx=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("count", "width"), [(12, 3072), (32, 11_008), (96, 12_288), (1024, 1024)])
def test_reports_of_large_networks_stay_small(pruned: vbpfx.Pruned, count: int, width: int) -> None:
    """Both files stay small with the blocks of a ViT-B, of language models with 7 B and 175 B, and of one with experts."""
    (like, *_) = pruned.analysis.blocks
    blocks = tuple(dataclasses.replace(like, name=f"blocks.{i}.mlp", width=width) for i in range(count))
    moments = Moments(100, torch.zeros(width, dtype=torch.float64), torch.rand(width, dtype=torch.float64))
    found = spectra(
        blocks, vbpfx.Statistics({b.name: (moments,) for b in blocks}), dataclasses.replace(pruned.plan, blocks=())
    )
    assert len(found) == count
    widths = dict.fromkeys(found, (width, width))
    report = dataclasses.replace(pruned.report, spectra=found, widths=widths)
    assert len(json.dumps(report.to_json(), indent=1)) < 300_000 + 1500 * max(0, count - 96)
    page = html_report(report)
    assert len(page.encode()) < 1_000_000
    figures = [figure.one("figcaption").text for figure in parse(page).all("figure")]
    assert figures == (list(found) if count <= 128 else list(found)[:: count // 128])
    assert ("The charts show 128 of 1,024 blocks" in page) == (count == 1024)


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ({}, "pruned by greedy_obs, block after block; compensated by reconstruction; ratio=0.4"),
        ({"method": "vbp"}, "pruned by variance; compensated by mean; ratio=0.4"),
        ({"criterion": "magnitude", "compensation": "none"}, "pruned by magnitude; not compensated; ratio=0.4"),
    ],
)
def test_how_it_was_pruned_is_said_in_words(given: dict[str, Any], title: str) -> None:
    assert str(vbpfx.prune(two(), data(), ratio=0.4, progress=False, **given)).splitlines()[0] == title


def test_names_are_no_markup_and_colours_are_never_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of classes and modules could be read as styles or emoji by rich."""
    for forced in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(forced, "1")
    text = table("[red]", ("block[b]",), [("layers[bold]",), (":cat:",), ("[/x]",)])
    assert [line.strip("│┃ ") for line in text.splitlines() if line[0] not in "┏┡└"] == [
        "[red]", "block[b]", "layers[bold]", ":cat:", "[/x]"
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_tables_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (f"encoder.layers.{i}.feed_forward.intermediate", 123_456_789 + i, "it is a residual stream") for i in (7, 8)
    ]
    given = ("a title", ("block", "width", "because"), rows)
    piped = table(*given)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = table(*given)
    assert max(map(len, shown.splitlines())) <= columns
    assert "123,456,796" in shown
    assert "123,456,797" in shown
    assert (shown == piped) == (columns == 140)
    assert len(piped.splitlines()) == 7  # title, header, two rows, and three rules


def test_numbers_are_whole_where_a_table_hardly_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of ratios of ``vbpfx inspect`` on 60 columns wraps its headers but not its numbers."""
    columns = ("ratio", "hidden neurons", "parameters", "kept", "MACs per sample", "kept")
    rows = [
        (0.1, 8294, 5_362_448, "93.8%", 1_183_935_744, "94.4%"),
        (0.9, 922, 2_524_228, "44.1%", 626_258_688, "50.0%"),
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    lines = table("", columns, rows).splitlines()
    assert max(map(len, lines)) <= 60
    found = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert found == [
        ["0.1", "8,294", "5,362,448", "93.8%", "1,183,935,744", "94.4%"],
        ["0.9", "922", "2,524,228", "44.1%", "626,258,688", "50.0%"],
    ]


def test_titles_are_not_broken_and_percentages_stand_below_one_another() -> None:
    title = "a title that is longer than the little table beneath it [is wide]"
    lines = table(title, ("name", "kept"), [("a", "100.0%"), ("b", "9.7%")]).splitlines()
    assert lines[0] == title
    assert [line.split("│")[2] for line in lines[4:6]] == [" 100.0% ", "   9.7% "]
    lines = table("", ("name", "ms"), [("a", "1,234.5"), ("b", "0.25"), ("c", "2e-07")]).splitlines()
    assert [line.split("│")[2] for line in lines[3:6]] == [" 1,234.5 ", "    0.25 ", "   2e-07 "]
