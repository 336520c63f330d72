"""Figures that README and docs state are those of the committed results and recipes; README's own are all of them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcn_dist.recipefile import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = ROOT / "launch" / "recipes"
Table = dict[str, dict[str, str]]
README = (ROOT / "README.md").read_text()


def table(name: str, title: str = "") -> Table:
    """One of a results file, cells by row and column."""
    text = (RESULTS / name).read_text()
    section = text[text.index(f"### {title}") :].split("\n### ")[0]
    head, _, *body = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    head = [cell.strip("| ") for cell in head][-len(body[0]) + 1 :]
    return {row[0]: dict(zip(head, row[1:], strict=False)) for row in body}


def plain(text: str) -> str:
    """On one line, without marks of emphasis."""
    return " ".join(text.replace("**", "").split())


def section(title: str, text: str = README) -> str:
    """Between a heading of README and the next."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)
    assert found
    return found[1]


def head_of(recipe: str) -> str:
    """The comment at its head, on one line."""
    return plain(" ".join(line[1:] for line in (RECIPES / recipe).read_text().splitlines() if line.startswith("#")))


def loading() -> Iterator[str]:
    """Rows of README's table, and what is said below it."""
    rows = {
        row: cells["images/s"]
        for title in ("loading", "where the time goes")
        for row, cells in table("loading-camvid.md", title).items()
    }
    alone = rows["decoding and cropping alone"]
    yield f"| this loader | {rows['ours']} | decoding and cropping alone, no loader | {alone} |"
    for ours, theirs in (("folder", "torch Dataset, folder"), *((name, name) for name in PEERS)):
        pillow, crop = rows[f"{theirs}, Pillow"], rows[f"{theirs}, our crop"]
        yield f"| {ours}, Pillow | {pillow} | {ours}, our decoding and crop | {crop} |"
    first = table("loading-camvid.md", "first batch of a fresh loader, ms")
    middle, start = (first[f"at the {place} of an epoch"]["median"] for place in ("middle", "start"))
    yield f"The first batch after a resume in the middle of an epoch takes {middle} ms, at its start {start} ms."
    facts = (RESULTS / "loading-camvid.md").read_text()
    assert "of 256x256;" in facts and "workers: 2\n" in facts and "rounds: 5\n" in facts
    yield "Crops of 256x256"
    yield "--workers 2 --rounds 5"


PEERS = ("webdataset", "mosaicml-streaming", "litdata")


def packing() -> Iterator[str]:
    """What README says of it."""
    checked = {row: cells["images/s"] for row, cells in table("packing-camvid.md", "packing, with the checks").items()}
    copied = table("packing-camvid.md", "packing, the peers without checks")
    theirs = [checked[f"webdataset ShardWriter, {processes}"] for processes in ("1 process", "2 processes")]
    yield (
        f"{checked['ours, 2 processes']} images/s in two processes, against {theirs[0]} of webdataset's writer with "
        f"the same checks in one, as it is used ({theirs[1]} in two), and "
        f"{copied['webdataset ShardWriter, 1 process']['images/s']} where it copies bytes"
    )


def camvid() -> Iterator[str]:
    """What README says of its result, and of the table of changes."""
    recipe, head = load_recipe(RECIPES / "camvid_cpu.yaml"), head_of("camvid_cpu.yaml")
    steps, batch = recipe.schedule.steps, recipe.train.global_batch
    assert steps and batch
    yield f"{steps} steps of {batch} crops ({steps * batch / 367:.1f} epochs)"
    found = re.search(r"(\d+ min \d+ s) on .*; ([\d.]+ % pixel accuracy and [\d.]+ % mean IoU) on", head)
    assert found
    yield f"start to scores in {found[1]}:"
    yield f"reach {found[2]} on the whole validation split"
    seeds = table("camvid-cpu.md", "scores on")
    yield f"seeds 0 and 1: {seeds['seed 0']['mean IoU %']} and {seeds['seed 1']['mean IoU %']} % mean IoU"
    assert "images: 1280 in each row" in (RESULTS / "ablation-cpu.md").read_text()
    yield "1,280 images each"
    changes = table("ablation-cpu.md", "one change")
    order = ("FCN-32s", "FCN-16s", "FCN-8s", "FCN-8s at once", "FCN-8s, not pretrained", f"{AT_ONCE}2", AT_ONCE[:14])
    values = [changes[name]["mean IoU %"] for name in (*order, f"{AT_ONCE}64")]
    names = ("FCN-32s", "FCN-16s", "FCN-8s", "FCN-8s at once", "FCN-8s, not pretrained", "at once, batch 2")
    yield f"| {' | '.join((*names, 'batch 16', 'batch 64'))} |"
    yield f"| {' | '.join(values)} |"
    updates = [changes[name]["steps"] for name in (f"{AT_ONCE}2", AT_ONCE[:14], f"{AT_ONCE}64")]
    yield f"({', '.join(updates)})"


AT_ONCE = "FCN-8s at once, batch "
# No figures of a measurement: what was measured upon, and names.
GIVEN = (
    "its 367 training and 101 validation frames at 480x360",
    "(AMD EPYC of family 26, two gloo ranks, ZeRO stage 1 in float32)",
    "with 11 classes",
    "of VGG16",
)


@pytest.mark.parametrize(
    ("title", "phrases"),
    [("A result", [*camvid()]), ("Loading and packing", [*loading(), *packing()])],
    ids=["A result", "Loading and packing"],
)
def test_every_figure_of_a_section_of_the_readme_is_that_of_its_source(title: str, phrases: list[str]) -> None:
    text = re.sub(r"^    .*\n", "", section(title), flags=re.M)  # commands, of which test_documents.py speaks
    text = plain(re.sub(r"\]\(.*?\)", "]", text))
    for phrase in phrases:
        assert phrase in text, f"README says otherwise than: {phrase}"
        text = text.replace(phrase, "")
    for phrase in GIVEN:
        text = text.replace(phrase, "")
    assert not re.findall(r"\d[\d.,]*", re.sub(r"FCN-\d+s", "", text)), text


def test_what_other_pages_say_was_measured_is_in_the_results() -> None:
    saving = table("saving.md", "a checkpoint")
    background, at_once = saving["ours, in the background"], saving["ours, at once"]
    peer = saving["DeepSpeed save_checkpoint"]
    waits = "training waits, s"
    speed = table("evaluation-cpu.md", "from pixels")
    ours, theirs = speed["ours, prediction"], speed["plain, prediction"]
    factors, of_avx512 = (
        [f"{float(rows[f'plain, {what}']['ours is x times']):.1f}" for what in ("prediction", "evaluation")]
        for rows in (speed, table("evaluation-cpu-avx512.md", "from pixels"))
    )
    shares = table("camvid-cpu.md", "share of the squared")
    score = {step: float(shares[f"step {step}"]["score layers"]) for step in (5, 80, 260)}
    ratios = sorted(float(row["ratio"]) for row in table("communication-cpu.md", "a step,").values())
    seeds, changes = table("camvid-cpu.md", "scores on"), table("ablation-cpu.md", "one change")
    measured = re.search(r"((?:\d+ min )?\d+ s) on .*; ([\d.]+ % pixel accuracy)", head_of("quickstart.yaml"))
    assert measured
    stated = {
        "README.md": [
            f"The first takes {measured[1]} on two CPU cores",
            f"labels {measured[2].removesuffix(' pixel accuracy')} of the pixels",
        ],
        "docs/resuming.md": [
            f"({background['GB']} GB, two CPU cores",
            f"training waits {background[waits]} s, and {at_once[waits]} s with `checkpoint.background=false`",
            f"takes {peer[waits]} s.",
            f"{background['a step meanwhile, s']} s in place of {background['a step, s']}",
        ],
        "docs/evaluating.md": [
            f"prediction is {factors[0]} times as fast",
            f"and evaluation {factors[1]} times: {ours['images/s']} and {theirs['images/s']} images a second",
            f"it is {of_avx512[0]} and {of_avx512[1]} times",
        ],
        "docs/watching.md": [
            f"{score[5]:.1f} % of the squared gradient at step 5, {score[80]:.0f} % at step 80 and {score[260]:.0f} %",
        ],
        "docs/memory.md": [f"was {ratios[3]:.2f} of the measured one"],
        "docs/recipes.md": [
            f"measured: {measured[2]}",
            f"| {measured[1]} | `bash launch/quickstart.sh`",
            f"{seeds['seed 0']['mean IoU %']} and {seeds['seed 1']['mean IoU %']} % mean IoU",
            f"in the ablation {changes['FCN-8s, not pretrained']['mean IoU %']} % mean IoU against "
            f"{changes['FCN-8s']['mean IoU %']} %",
        ],
    }
    for page, phrases in stated.items():
        text = plain((ROOT / page).read_text())
        for phrase in phrases:
            assert phrase in text, f"{page} says otherwise than: {phrase}"
