"""Every block of code in README and docs: run as written, or listed with the reason why not and its options checked."""

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from documents import BLOCKS, ELISION, PAGES, ROOT, Block, check_options
from staging import lay_out, make_kit, put, server_of, shell_in, tasks_of

from fcn_dist.config import Recipe

# What is no code, by how its first line begins.
SHOWN = {
    "scenes folder -> shards + index.json -> batches -> engine -> checkpoint ->",
    "fcn_dist/",
    "RUN/checkpoints/",
    "OUT/training/",
    "the checkpoint was cut for 2 ranks x accumulation 1 x up to 5 images, ZeRO stage 2, float32;",
    "epoch    slots 0 .............................................",
    "no rank has made progress for 8 s (train.watchdog), so the job ends with code 77:",
    "step 20: rank 1 on node2 slows the others down: it waits for data; a step takes 0.41 s of its own",
}
# Why a command is not run. Its options are checked all the same.
HOURS = "trains for hours, or is meant for GPUs"
INSTALLS = "installs packages"
HOSTS = "needs several hosts"
SLURM = "needs Slurm"
ACCOUNT = "wants an account on a server elsewhere"
BUCKET = "needs a bucket"
FETCHES = "fetches the public data set"
REHEARSED = "rehearses full-size steps for a minute; the command after it, with smaller crops, is run"
LISTED = {
    "bash launch/quickstart.sh": INSTALLS,
    "bash tests/run.sh": INSTALLS,
    "python shards/download.py ADEChallengeData2016": FETCHES,
    "deepspeed launch/train.py --shards shards-ade --output runs/fcn8s --recipe launch/recipes/sceneparsing.yaml "
    "--deepspeed_config launch/zero/zero1_bf16.json --set model.weights=vgg16-397923af.pth "
    "--set model.weights_convention=torchvision": HOURS,
    "deepspeed --num_gpus 2 launch/train.py --shards shards-camvid --output runs/camvid "
    "--recipe launch/recipes/camvid_cpu.yaml --deepspeed_config launch/zero/zero1_fp32.json "
    "--set model.weights=vgg16_conv_caffe.safetensors": HOURS,
    "fcn-dist train --hostfile launch/hostfile.example --auto-resume --shards /shared/shards-ade "
    "--output /shared/runs/fcn8s --recipe launch/recipes/sceneparsing.yaml": HOSTS,
    "sbatch launch/slurm/train.sbatch --shards SHARDS --output RUN --recipe RECIPE --deepspeed_config CONFIG": SLURM,
    "deepspeed launch/train.py --shards s3://bucket/shards-ade --output RUN "
    "--recipe launch/recipes/sceneparsing.yaml --set data.cache_limit=500GB": BUCKET,
    "python benchmarks/equivalence.py": HOURS,
    "deepspeed --num_gpus 2 launch/train.py --shards SHARDS --output RUN --recipe launch/recipes/camvid_cpu.yaml "
    "--deepspeed_config launch/zero/zero1_fp32.json --set model.weights=vgg16_conv_caffe.safetensors": HOURS,
    "deepspeed --num_gpus 1 launch/train.py --shards SHARDS --output RUN --recipe launch/recipes/camvid.yaml "
    "--deepspeed_config launch/zero/zero1_bf16.json --set model.weights=vgg16_conv_caffe.safetensors": HOURS,
    "deepspeed launch/train.py --shards SHARDS --output RUN --recipe launch/recipes/sceneparsing.yaml "
    "--deepspeed_config launch/zero/zero1_bf16.json --set model.weights=vgg16-397923af.pth "
    "--set model.weights_convention=torchvision": HOURS,
    "deepspeed --num_gpus 1 launch/train.py --shards SHARDS --output RUN "
    "--recipe launch/recipes/reference_atonce.yaml --deepspeed_config launch/recipes/reference_atonce.json "
    "--set model.weights=vgg16_conv_caffe.safetensors": HOURS,
    "deepspeed launch/train.py --shards SHARDS --output RUN --recipe launch/recipes/fcn_tensorflow.yaml "
    "--deepspeed_config launch/recipes/fcn_tensorflow.json --set model.weights=vgg19-dcbb9e9d.pth "
    "--set model.weights_convention=torchvision": HOURS,
    "python launch/plan.py --recipe launch/recipes/sceneparsing.yaml --gpus 8 --gpu-memory 12GB": REHEARSED,
    "wandb sync RUN/wandb/offline-run-*": ACCOUNT,
    "pip install -e '.[serve]'": INSTALLS,
    "pip install -e '.[report]'": INSTALLS,
}
PAGES_THAT_LAUNCH = {"README.md", "docs/clusters.md", "docs/evaluating.md", "docs/memory.md", "docs/resuming.md"}
SLOW = PAGES_THAT_LAUNCH | {"docs/dataset.md", "docs/modelfile.md", "docs/watching.md"}
COMMANDS = [(block, command) for block in BLOCKS if block.kind == "commands" for command in block.commands]


def runs(command: str) -> bool:
    """Whether it is run as written."""
    return command not in LISTED and ELISION not in command.split()


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once."""
    return make_kit(tmp_path_factory.mktemp("kit"))


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {str(block): block.kind for block in BLOCKS}
    assert set(kinds.values()) <= {"commands", "python", "yaml", "text", "shown"}, kinds
    shown = [block.text.splitlines()[0] for block in BLOCKS if block.kind == "shown"]
    assert not [line for line in shown if not line.startswith(tuple(SHOWN))]
    assert not [begin for begin in SHOWN if not any(line.startswith(begin) for line in shown)]


def test_no_reason_is_listed_for_a_command_that_stands_nowhere() -> None:
    assert set(LISTED) <= {command for _, command in COMMANDS}


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=lambda value: str(value).replace("/", "|"))
def test_a_command_is_one_that_its_programs_take(
    block: Block, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        check_options(command)
    except SystemExit:
        pytest.fail(f"{block}: {command}\n{capsys.readouterr().err}")


@pytest.mark.timeout(900)  # of all its commands; each has its own limit
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES]
)
def test_the_commands_of_a_page_run_as_written(page: str, kit: Path, tmp_path: Path) -> None:
    mine = [block for block in BLOCKS if block.page == page]
    lay_out(page, kit, tmp_path)
    with shell_in(tmp_path) as shell:
        for block in mine:
            if block.kind == "python":
                (tmp_path / "block.py").write_text(block.text)
                shell.run("python block.py *.safetensors")
            for command in block.commands if block.kind == "commands" else []:
                if not runs(command):
                    continue
                if not shutil.which(command.split()[0]):
                    pytest.skip(f"{command.split()[0]} is not installed")
                if "resume" in command and "--output RUN" in command:
                    put(kit / "stopped", tmp_path / "RUN")  # one of several ways to go on, each from the same place
                if ready := server_of(command):
                    shell.serve(command, ready)
                    continue
                for variables in tasks_of(command):
                    shell.run(command, **variables)


def test_every_recipe_key_that_a_page_names_exists() -> None:
    known = {f"{section.name}.{key.name}" for section in fields(Recipe) for key in fields(section.type)}  # type: ignore[arg-type]
    sections = "|".join(section.name for section in fields(Recipe))
    # "model." alone may begin a file's name, or a key of a model file.
    pattern = rf"`((?:{sections})\.[a-z_]+)(?=[=:])|`((?!model|evaluate\.py)(?:{sections})\.[a-z_]+)"
    named = {(page, a or b) for page, path in PAGES.items() for a, b in re.findall(pattern, path.read_text())}
    assert {key for _, key in named} >= {"train.ema", "data.cache_limit"}
    assert not {(page, key) for page, key in named if key not in known}


def test_every_link_of_a_page_leads_to_a_file() -> None:
    for path in PAGES.values():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_every_file_of_the_checkout_that_a_page_names_is_there() -> None:
    for page, path in PAGES.items():
        text = re.sub(r"\]\(.*?\)", "]", path.read_text())
        for name in re.findall(r"(?<![\w./-])(?:launch|shards|benchmarks|tests|fcn_dist)/[\w/.-]*\w", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
