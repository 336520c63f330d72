"""The report: what it says of a run, held against hand-made run folders; nothing in them becomes markup."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged_runs import CLASSES, COMMAND, HOST, evaluated, journal, looked, record, start, trained, write_run

from fcn_dist.commands.entry import run_script
from fcn_dist.config import ModelConfig
from fcn_dist.reporting import report as report_module
from fcn_dist.reporting.classes import Confusion, confusions
from fcn_dist.reporting.curves import POINTS, smooth, thinned
from fcn_dist.reporting.depth import layers_of, shares_of
from fcn_dist.reporting.history import again
from fcn_dist.reporting.rundata import Look, read_run
from fcn_dist.reporting.scenes import errors

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(*runs: Path, output: Path | None = None) -> Page:
    more = ["--output", str(output)] if output else []
    assert run_script("report", [*map(str, runs), *more]) == 0
    default = runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    return Page((output or default).read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert run_script("report", [str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_page_says_what_was_run_and_how_to_run_it_again(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    wanted = "launch/train.py --shards 'my shards' --output '<b>run</b>' --set log.layers=2"
    assert f"deepspeed --num_gpus 2 {wanted}" in page.text and f"deepspeed --num_gpus 3 {wanted} --resume" in page.text
    assert "Begun on 1970-01-01 00:16 UTC, with 2 ranks" in page.text
    assert "Continued after step 20 on 1970-01-01 00:17 UTC, with 3 ranks" in page.text
    for said in (
        *(COMMAND, "c" * 40 + ", with changes that were not committed", "torch 2.13.0", HOST, "/data/my shards"),
        *("a" * 64, "2 ranks x micro-batch 2 x accumulation 1", "Trained to its last step, 40", "straggler (1)"),
        *(
            "40.00 %",
            "80.00 %",
            "40.00 % at step 40",
            "0.0500",
            "2.5 GB",
            "25.0 %",
            "train.seed",
            "deepspeed.zero.stage",
        ),
        "Of the evaluation after step 40, 12 of 12 validation scenes, with the averaged weights.",
    ):
        assert said in page.text, said
    assert page.count("svg") == 8 + 2 + 1 and page.count("img") == 36


@pytest.mark.parametrize(
    ("command", "ranks", "wanted"),
    [
        ("launch/train.py --local_rank=3 --shards s", 4, "deepspeed --num_gpus 4 launch/train.py --shards s"),
        ("launch/train.py --set 'data.crop=[1,2]'", 1, "python launch/train.py --set 'data.crop=[1,2]'"),
        ("'fcn-dist train' --shards s", 4, "fcn-dist train --shards s --ranks 4"),
        ("'fcn-dist train' --shards s", 1, "fcn-dist train --shards s"),
    ],
)
def test_a_start_s_command_is_one_that_a_shell_takes(command: str, ranks: int, wanted: str) -> None:
    assert again(command, ranks) == wanted


def test_nothing_that_comes_from_a_run_becomes_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<u>run</u>")
    for page in (page_of(run), page_of(run, write_run(tmp_path / "other"))):
        assert page.count("script") == page.count("i") == page.count("u") == page.count("link") == 0
        assert page.count("style") == 1, "that of the page, and none of a chart"
        for tag, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            for name in ("src", "href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
        for name in CLASSES:
            assert name in page.text
        assert "<u>run</u>" in page.text
    assert "url(http" not in (run / "report.html").read_text() and "scene <i>8</i>" in page_of(run).text


def test_a_class_s_name_is_not_set_as_a_formula_and_keeps_its_text(tmp_path: Path) -> None:
    text = (write_run(tmp_path / "run"), page_of(tmp_path / "run"))[0].joinpath("report.html").read_text()
    matrix = text[text.index('aria-label="Confusion matrix') :]
    matrix = matrix[: matrix.index("</svg>")]
    assert ">sky $x_1$</text>" in matrix and "mathdefault" not in text
    assert ">tree &amp; #00f0a0</text>" in matrix  # though it has the name of a colour


def test_charts_have_no_colour_of_their_own_but_those_of_shares(tmp_path: Path) -> None:
    """Lines and text take the page's, which differ with the theme; so none is left of the ones they were drawn in."""
    page_of(write_run(tmp_path / "run", scenes=0))
    text = (tmp_path / "run" / "report.html").read_text()
    for svg in text.split("<svg ")[1:]:
        styles = [part.split('"', 1)[0] for part in svg.split("</svg>")[0].split(' style="')[1:]]
        colours = [one for style in styles for one in style.split(";") if "#" in one and "clip" not in one]
        assert not [one for one in colours if "url(" not in one], colours


def test_ids_are_the_page_s_only_ones(tmp_path: Path) -> None:
    """Charts refer to parts of themselves by id, and share a document."""
    page = page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    groups = {one for one in ids if one and one.startswith(("matplotlib", "legend", "figure"))}
    assert not groups and len(set(ids)) == len(ids)
    used = {(attributes.get("xlink:href") or "#")[1:] for tag, attributes in page.elements if tag == "use"}
    assert used and used <= set(ids)


def test_layers_are_named_and_ordered_as_the_network_has_them() -> None:
    """Against the network itself: a new stage begins after every pooling."""
    import torch

    from fcn_dist.model.fcn import FCN

    for backbone, frozen in (("vgg16", 0), ("vgg19", 3), ("vgg16_bn", 0), ("vgg19_bn", 2)):
        with torch.device("meta"):
            model = FCN(3, ModelConfig(backbone=backbone, frozen_stages=frozen))  # type: ignore[arg-type]
        names = [name for name, one in model.named_parameters() if one.requires_grad]
        wanted: list[str] = []
        for stage, layers in enumerate(model.stages(), 1):
            convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
            wanted += [f"conv{stage}_{number}" for number in range(1, len(convolutions) + 1) if stage > frozen]
        found = layers_of([Look(1, dict.fromkeys(names, 1.0))], frozen)
        assert [layer.name for layer in found] == [*wanted, "fc6", "fc7", "score_fr", "score_pool4", "score_pool3"]
        assert [name for layer in found for name in layer.parameters] == names
        assert [layer.in_trunk for layer in found] == [name.startswith("conv") for name in wanted] + [False] * 5


def test_shares_are_of_the_squared_gradient_and_a_look_that_was_not_finite_has_none() -> None:
    looks = [
        Look(1, {"features.0.weight": 3.0, "features.0.bias": 4.0, "fc6.weight": 5.0}),
        Look(2, {"features.0.weight": float("nan"), "features.0.bias": 4.0, "fc6.weight": 5.0}),
        Look(3, {"features.0.weight": 0.0, "features.0.bias": 0.0, "fc6.weight": 0.0}),
    ]
    shares = shares_of(looks, layers_of(looks, 0))
    assert shares[:, 0].tolist() == [0.5, 0.5] and np.isnan(shares[:, 1:]).all()


def test_the_head_s_share_is_told_and_without_looks_the_setting_is(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run")).text
    assert "96 % at step 2, 56 % at step 22, 20 % at step 40" in text
    events = [line for line in journal() if line["event"] != "layers"]
    page = page_of(write_run(tmp_path / "blind", events))
    assert "--set log.layers=20" in page.text and page.count("svg") == 8 + 1


def test_confusions_are_named_by_the_pixels_they_cost() -> None:
    counts = np.zeros((4, 4), np.int64)
    counts[1], counts[2], counts[3] = (0, 60, 40, 0), (5, 0, 300, 45), (0, 0, 50, 0)
    counts[0] = 1000  # truth "other" is not scored, whatever it is taken for
    assert confusions(counts, ("wall, brick", "sky", "tree"), 3) == [
        Confusion("tree", "sky", 50, 1.0, 0.1),
        Confusion("sky", "tree", 45, 45 / 350, 0.09),
        Confusion("wall", "sky", 40, 0.4, 0.08),
    ]
    assert confusions(np.diag([0, 5, 5, 5]), ("a", "b", "c")) == []


def test_classes_stand_by_iou_with_those_that_are_nowhere_last(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", scenes=0))
    # By hand: 600 / 950, 900 / 1200, 50 / 150, 0 / 150.
    rows = page.text[page.text.index("class IoU found pixels") :]
    order = [rows.index(name) for name in (CLASSES[1], CLASSES[0], CLASSES[2], CLASSES[3])]
    assert order == sorted(order)
    for said in ("75.0 % 90.0 % 50.00 %", "63.2 % 75.0 % 40.00 %", "33.3 % 100.0 % 2.50 %", "0.0 % 0.0 % 7.50 %"):
        assert said in rows, said
    assert f"{CLASSES[5]} - - 0.00 %" in rows
    assert f"{CLASSES[0]} → sky $x_1$ 25.0 % 10.00 %" in page.text
    assert "evaluate.scenes=9" in page.text


def test_errors_are_red_and_what_is_not_labelled_is_dark() -> None:
    image = np.full((1, 3, 3), 200, np.uint8)
    shown = errors(image, np.array([[1, 1, 0]], np.uint8), np.array([[1, 2, 2]], np.uint8))
    right, wrong, unlabelled = shown[0].astype(int)
    assert right.tolist() == [210] * 3 and unlabelled.tolist() == [73] * 3 and wrong[0] > 2 * wrong[1:].max()


def test_long_curves_are_means_of_neighbours_and_gaps_stay() -> None:
    steps = np.arange(1.0, 4 * POINTS + 1)
    figures = np.where(steps <= 4, np.nan, steps)
    thin_steps, thin = thinned(steps, figures)
    assert len(thin) == POINTS and np.isnan(thin[0]) and thin[1] == 6.5 == thin_steps[1]
    assert thinned(steps[:9], figures[:9])[1] is not None and len(thinned(steps[:9], figures[:9])[0]) == 9
    smoothed = smooth(np.array([1.0, np.nan, 3.0, 8.0]), 1)
    assert smoothed[[0, 2, 3]].tolist() == [1.0, 5.5, 5.5] and np.isnan(smoothed[1])


def text_of(tmp_path: Path, name: str, events: list[dict[str, Any]], **changed: Any) -> Page:
    return page_of(write_run(tmp_path / name, events, scenes=-1, **changed))


def test_runs_that_are_young_cut_or_without_figures_have_a_page_too(tmp_path: Path) -> None:
    page = text_of(tmp_path, "young", [])
    assert "metrics.jsonl is empty" in page.text and page.count("svg") == 0
    page = text_of(tmp_path, "going", [start(0, 2), trained(2), trained(4)])
    assert "At step 4 of 40, going on or stopped there" in page.text and "evaluate.every=N" in page.text
    page = text_of(tmp_path, "shorter", [start(0, 2), trained(2), start(2, 2) | {"steps": 4}, trained(4)])
    assert "Trained to its last step, 4;" in page.text and "4 of 4" in page.text
    nothing = dict.fromkeys(("loss", "gradient_norm", "images_per_second", "data_wait", "peak_memory"))
    page = text_of(tmp_path, "nulls", [start(0, 2), trained(2, **nothing), evaluated(2, None, None)])
    assert "Loss; Validation: mean IoU" in page.text and page.count("svg") == 1, "the learning rate's"
    page = text_of(tmp_path, "gap", [start(0, 1), trained(2), trained(4, loss=None), trained(6)])
    assert "Crosses: 1 step without a finite figure." in page.text
    looks = [start(0, 1), looked(2, 0.5), looked(4, 0.5)]
    looks[1]["layers"]["fc6.weight"]["gradient"]["norm"] = None
    page = text_of(tmp_path, "looks", looks)
    assert "50 % at step 4" in page.text
    looks[2]["layers"]["fc6.weight"]["gradient"]["norm"] = None
    assert "No look had a finite gradient" in text_of(tmp_path, "no look", looks).text


def test_a_run_that_began_anew_is_told_from_one_that_was_continued(tmp_path: Path) -> None:
    page = text_of(tmp_path, "anew", [start(0, 1), start(0, 1), trained(2), start(2, 1), trained(4)])
    told = [page.text.find(words) for words in ("Begun on", "Begun anew on", "Continued after step 2 on")]
    assert -1 < told[0] < told[1] < told[2] and "restarts" in page.text
    assert "restarts" not in text_of(tmp_path, "no restart", [start(0, 1), start(0, 1), trained(2)]).text


def test_a_chart_of_one_step_has_whole_steps_on_its_axis(tmp_path: Path) -> None:
    page = text_of(tmp_path, "one step", [start(0, 1), trained(5)])
    assert "4 5 6" in page.text and "4.8" not in page.text


def test_one_look_has_marks_of_head_and_trunk(tmp_path: Path) -> None:
    page = text_of(tmp_path, "run", [start(0, 1), trained(4), looked(4, 0.75)])
    drawn = chart(tmp_path / "run", "Head and trunk, % of the squared gradient")
    assert marks_of(drawn) == [2], "one in the chart, and one in its legend"
    assert "75 % at step 4" in page.text and steps_of(drawn) == [3, 4, 5]


def chart(run: Path, title: str) -> str:
    """The SVG below a title on a run's page."""
    text = (run / "report.html").read_text()
    return text[text.index(f"<h3>{title}</h3>") :].split("</svg>", 1)[0]


def steps_of(svg: str) -> list[int]:
    """The numbers at the level axis."""
    return [int(one) for one in re.findall(r">(\d+)</text>", svg.partition(">step</text>")[0])]


def marks_of(svg: str) -> list[int]:
    """How many there are in the first run's colour, of each shape, the rarest first."""
    return sorted(Counter(re.findall(r'<use xlink:href="(\S+)" [^>]*"fill: var\(--series-0\)', svg)).values())


def diverged(every: int, finite: int, allowed: int) -> list[dict[str, Any]]:
    """A journal with a line every so many steps: so many steps are finite, and then one more is not than is allowed."""
    events = [start(0, 1)]
    for step in range(1, finite + allowed + 2):
        if step > finite:
            events.append(
                {"event": "not_finite", "step": step, "time": 1000.0 + step, "what": "loss", "allowed": allowed}
            )
        if step % every == 0 and step <= finite + allowed:  # at one too many, training ends
            gone = {} if step - every < finite else {"loss": None, "gradient_norm": None}
            events.append(trained(step, **gone))
    return events


def test_a_run_that_diverged_says_so_and_shows_where(tmp_path: Path) -> None:
    page = text_of(tmp_path, "run", diverged(1, 1, 10))
    assert "Training diverged and ended at step 12 of 40: 11 steps not finite, and" in page.text
    assert "train.max_skipped_steps allows 10" in page.text and "going on" not in page.text
    assert "not finite; 2.0000 at step 1 loss" in page.text
    loss, norm, rate = (chart(tmp_path / "run", title) for title in ("Loss", "Gradient norm", "Learning rate"))
    assert steps_of(loss) == steps_of(norm) == steps_of(rate) and max(steps_of(loss)) == 12
    assert [marks_of(drawn) for drawn in (loss, norm, rate)] == [[1, 11], [1, 10], [11]]
    assert "Crosses: 11 steps without a finite figure." in page.text
    assert "11 steps without a finite figure, the last of them 12" in loss, "for those who hear the page"


def test_steps_that_are_not_finite_between_two_lines_are_shown_too(tmp_path: Path) -> None:
    page = text_of(tmp_path, "run", diverged(10, 21, 4))
    assert "Training diverged and ended at step 26 of 40" in page.text
    assert "not finite; 0.1000 at step 20 loss" in page.text and "Crosses: 5 steps" in page.text
    several = page_of(tmp_path / "run", write_run(tmp_path / "other"))
    assert "diverged" in several.text and "not finite; 0.1000 at step 20" in several.text


def test_a_run_that_goes_on_after_steps_that_were_not_finite_has_not_diverged(tmp_path: Path) -> None:
    events = diverged(1, 1, 10)
    page = text_of(tmp_path, "on", [*events, trained(12), trained(13)])
    assert "At step 13 of 40, going on" in page.text and f"{2 / 13:.4f} loss" in page.text
    page = text_of(tmp_path, "allowed", [line | {"allowed": 11} if "what" in line else line for line in events])
    assert "At step 12 of 40, going on" in page.text and "not finite; 2.0000 at step 1 loss" in page.text
    page = text_of(tmp_path, "again", [*events, start(12, 1)])  # which allows more
    assert "At step 12 of 40, going on" in page.text


def test_one_finite_loss_among_many_that_are_not_is_drawn(tmp_path: Path) -> None:
    text_of(tmp_path, "run", diverged(1, 1, 99))
    assert marks_of(chart(tmp_path / "run", "Loss")) == [1, 100]


def test_tiles_say_what_they_are_of(tmp_path: Path) -> None:
    speeds, waits = (1.0, 2.0, 9.0), (0.0, 0.0, 0.3)
    events = [
        trained(step, images_per_second=speed, data_wait=wait)
        for step, (speed, wait) in enumerate(zip(speeds, waits, strict=True), 1)
    ]
    page = text_of(tmp_path, "run", [start(0, 1), *events])
    assert "2.0 images per second, median" in page.text and "10.0 % waiting for data, mean" in page.text


def test_one_class_is_no_classes(tmp_path: Path) -> None:
    model = record()["model"]
    page = text_of(tmp_path, "run", [], model=model | {"classes": CLASSES[:1]})
    assert "fcn8s on vgg16, 1 class, seed 7" in page.text
    assert "fcn8s on vgg16, 6 classes, seed 7" in text_of(tmp_path, "more", []).text


def test_the_colours_of_errors_are_not_among_those_of_classes(tmp_path: Path) -> None:
    write_run(tmp_path / "run"), page_of(tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    of_classes, of_errors = (Page(one.split("</ul>")[0]) for one in text.split('<ul class="legend">')[1:])
    assert "wrong" not in of_classes.text and of_classes.text.startswith(
        f"Classes, in truth and prediction: {CLASSES[0]}"
    )
    assert of_errors.text == "In the errors alone, whatever the class: wrong not labelled"


def test_a_start_s_command_comes_with_the_folder_that_it_was_made_in(tmp_path: Path) -> None:
    starts = [start(0, 1), start(2, 1) | {"folder": "/data/<b>my</b> runs; ls"}]
    text_of(tmp_path, "run", [starts[0], trained(2), starts[1], trained(4)])
    text = (tmp_path / "run" / "report.html").read_text()
    commands = ["".join(Page(one.split("</pre>")[0]).texts) for one in text.split("<pre ")[1:]]
    # A line that does not tell of one.
    assert [len(one.splitlines()) for one in commands] == [1, 2]
    assert shlex.split(commands[1].splitlines()[0].partition(">")[2]) == ["cd", "/data/<b>my</b> runs; ls"]
    young = write_run(tmp_path / "young", [])
    (young / "run.json").write_text(json.dumps(record() | {"folder": "/data/here"}))
    assert "cd /data/here deepspeed --num_gpus 2 launch/train.py" in page_of(young).text


def renamed(run: Path, classes: Sequence[str]) -> Path:
    """The run with other names of its classes."""
    path = run / "predictions" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for one, name in zip(evaluation["classes"], classes, strict=True):
        one["name"] = name
    path.write_text(json.dumps(evaluation))
    made = json.loads((run / "run.json").read_text())
    made["model"]["classes"] = classes
    (run / "run.json").write_text(json.dumps(made))
    return run


def test_classes_whose_short_names_are_alike_have_their_whole_ones(tmp_path: Path) -> None:
    others = ["sky, air", "tree", "sea", "hill", "none"]
    one = renamed(write_run(tmp_path / "one"), ["road, route", *others])
    other = renamed(write_run(tmp_path / "other"), ["road", *others])
    page = page_of(one, other)
    assert "road, route 63.2 % - " in page.text and "road - 63.2 %" in page.text
    assert "sky 75.0 % 75.0 %" in page.text, "one class, with its short name"
    within = page_of(renamed(one, ["road, route", "road", *others[1:]]))
    assert "road, route 63.2 %" in within.text and "road, route → road 25.0 %" in within.text


def test_runs_beyond_the_colours_are_dashed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{number}", [start(0, 1), trained(2), trained(4)]) for number in range(10)]
    page = page_of(*runs)
    entries = [attrs.get("class") or "" for tag, attrs in page.elements if tag == "span"]
    lines = [entry for entry in entries if entry.startswith("line ")]
    assert len(set(lines)) == 10 and [entry.endswith(" dashed") for entry in lines] == [False] * 8 + [True] * 2
    assert (runs[0] / "comparison.html").read_text().count("stroke-dasharray") >= 2


def test_a_last_line_that_is_cut_is_left_out_and_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    whole = read_run(run, "run")
    path.write_text(path.read_text() + json.dumps(trained(42))[:-9])
    assert read_run(run, "run").steps == 40 == whole.steps
    path.write_text('not JSON\n[1, 2]\n{"event": "train", "step": 1, "time": null}\n' + path.read_text())
    assert "lines that could not be read (3)" in page_of(run).text


@pytest.mark.parametrize(
    "damaged",
    [
        trained(4, loss="abc"),
        trained(4, peak_memory=[1]),
        evaluated(4, 0.5, 0.5) | {"official": {"mean_iou": "abc"}},
        evaluated(4, 0.5, 0.5) | {"official": None},
        start(0, 2) | {"world_size": "two"},
        start(0, 2) | {"steps": None},
        looked(4, 0.5) | {"layers": [1]},
        looked(4, 0.5) | {"layers": {"fc6.weight": {"gradient": {"norm": "abc"}}}},
        looked(4, 0.5) | {"layers": {"fc6.weight": {}}},
        trained(4) | {"loss": 10**400},
        start(4, 2) | {"command": "train.py 'quoted"},
        {"event": "not_finite", "step": 4, "time": 4.0},
    ],
)
def test_a_line_with_a_figure_of_the_wrong_type_is_one_that_could_not_be_read(
    tmp_path: Path, damaged: dict[str, Any]
) -> None:
    page = text_of(tmp_path, "run", [start(0, 2), trained(2), damaged, trained(6)])
    assert "lines that could not be read (1)" in page.text and "At step 6 of 40" in page.text


def changed(counts: list[Any], number: float) -> list[Any]:
    """With another number in the first place."""
    return [[number, *counts[0][1:]], *counts[1:]]


def test_an_evaluation_that_cannot_be_read_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    run, whole = write_run(tmp_path / "run"), write_run(tmp_path / "whole")
    path = run / "predictions" / "evaluation.json"
    text = path.read_text()
    evaluation = json.loads(text)
    counts, classes = evaluation["confusion"], evaluation["classes"]
    nothings: list[Any] = [None, [1], [{}]]
    for damaged in (
        text[: len(text) // 2],
        *(json.dumps(evaluation | {"confusion": wrong}) for wrong in (counts[1:], [counts[0], [1]], "abc", None)),
        *(json.dumps(evaluation | {"confusion": changed(counts, number)}) for number in (-1, 0.5, 10**30)),
        *(json.dumps(evaluation | {"scenes": wrong}) for wrong in nothings),
        *(json.dumps(evaluation | {"classes": wrong * len(classes)}) for wrong in nothings[1:]),
        *(
            json.dumps(evaluation | {"classes": [classes[0] | {"iou": wrong}, *classes[1:]]})
            for wrong in ("a", 10**400)
        ),
        json.dumps(evaluation | {"step": "4"}),
        json.dumps({key: value for key, value in evaluation.items() if key != "split"}),
        json.dumps([1]),
        "[" * 100_000,
    ):
        path.write_text(damaged)
        page = page_of(run)
        assert f"{path} is there and cannot be read" in page.text and "No evaluation has left" not in page.text
    for others in ([whole], [write_run(tmp_path / "without", scenes=-1)]):
        page = page_of(run, *others, output=tmp_path / "compared.html")
        assert f"{path} is there and cannot be read" in page.text
    path.unlink()
    assert "No evaluation has left its classes" in page_of(run).text


def test_a_journal_that_is_gone_is_not_a_run_that_has_gone_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    for content, told in (("", "is empty"), ("not JSON\n", "tells of no start and no step"), (None, "is missing")):
        path.unlink() if content is None else path.write_text(content)
        page = page_of(run)
        assert f"Nothing is on record: {path} {told}." in page.text
        assert "gone back" not in page.text and "0 of 40" not in page.text and "checkpoints written 0" not in page.text
        assert "Of the evaluation after step 40" in page.text and "No evaluation is on record" not in page.text


def test_pictures_that_are_gone_are_counted_and_an_older_evaluation_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [start(0, 2), trained(2)])
    for name in ("best-1.jpg", "worst-2-truth.png"):
        (run / "predictions" / "step-00000040" / name).unlink()
    page = page_of(run)
    assert "2 scenes could not be read" in page.text and page.count("img") == 28
    assert "The run has gone back since: step 2 is the last on record." in page.text


def test_damaged_pictures_are_told_on_the_page_and_nowhere_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    pictures = run / "predictions" / "step-00000040"
    for name, share in (("best-1.jpg", 0.5), ("best-2-truth.png", 0.9), ("worst-2-truth.png", 0.1), ("worst-3.jpg", 0)):
        content = (pictures / name).read_bytes()
        (pictures / name).write_bytes(content[: int(len(content) * share)])
    flipped = bytearray((pictures / "median-1-truth.png").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (pictures / "median-1-truth.png").write_bytes(flipped)
    capfd.readouterr()
    page = page_of(run)
    assert "5 scenes could not be read" in page.text and page.count("img") == 16
    assert capfd.readouterr().err == ""


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty is no run folder" in refused(capsys, tmp_path / "empty")
    assert "gone is no run folder" in refused(capsys, tmp_path / "gone")
    (tmp_path / "foreign").mkdir()
    for content in ("{", "[]", json.dumps({"some": "thing"})):
        (tmp_path / "foreign" / "run.json").write_text(content)
        assert "is no run record" in refused(capsys, tmp_path / "foreign")
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "foreign", "run.json"}, "nothing is written"
    run = write_run(tmp_path / "run")
    assert "is named twice" in refused(capsys, run, run)
    assert "cannot be written" in refused(capsys, run, "--output", tmp_path / "no" / "folder.html")


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    page_of(run)
    before = (run / "report.html").read_text()

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert run_script("report", [str(run)]) == 2
    assert (run / "report.html").read_text() == before
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_several_runs_stand_side_by_side_with_what_differs_marked(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run")
    other = record()["recipe"] | {"train": {"seed": 8}}
    events = [start(0, 1), trained(20, loss=0.125), evaluated(20, 0.5, 0.75)]
    second = write_run(tmp_path / "b" / "run", events, recipe=other, world_size=1)
    page = page_of(first, second)
    assert "40.00 % 50.00 %" in page.text and "0.0500 0.1250" in page.text and "40 of 40 20 of 40" in page.text
    assert "train.seed 7 8 " in page.text and "world_size 2 1" in page.text and "data.crop" not in page.text
    assert page.count("mark") == 2 and "a/run" in page.text and "b/run" in page.text
    assert page.count("svg") == 8 + 2, "one of each curve, and the layers of the run that looked"
    assert not (first / "report.html").exists(), "a comparison is not the first run's own page"
    assert (
        "The runs have one configuration" in page_of(first, write_run(tmp_path / "c"), output=tmp_path / "x.html").text
    )


def test_a_page_is_the_same_when_it_is_written_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page_of(run, output=tmp_path / "one.html")
    page_of(run, output=tmp_path / "two.html")
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    paths = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "report.py"), str(run)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and 'pip install "fcn-dist[report]"' in done.stderr
    assert "Traceback" not in done.stderr and not (run / "report.html").exists()


def test_neither_torch_nor_deepspeed_is_loaded_for_a_report(tmp_path: Path) -> None:
    code = "import sys; import fcn_dist.reporting.report; print({'torch', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
    assert report_module.REPORT_NAME == "report.html"
