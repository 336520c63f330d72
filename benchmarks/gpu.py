"""Everything that needs a GPU: each part in, with a time limit of its own; one JSON and one Markdown table out.

`gpu.sh` says how it is called. It needs the standard library alone, for the packages may have to be installed first.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 530.0  # seconds, of the 9 minutes that are allowed
SPARE = 15  # seconds between a benchmark's own limit, with which it still reports, and that at which it is ended
ENDS_WITHIN = 5.0  # seconds that a benchmark takes at most to end what it has started
TAIL = 4000  # characters kept of what a part that failed has printed
JUNIT = "tests.xml"

PROBE = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if found else None,
    "memory": f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB" if found else None,
    "torch": torch.__version__, "CUDA": torch.version.cuda,
    "cuDNN": torch.backends.cudnn.version() if found else None,
}))
"""
CHECK = "CPU (a check of this command alone; these figures say nothing of a GPU)"


@dataclass(frozen=True)
class Part:
    """Something to run: arguments of the interpreter, and seconds it may take."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    report: str = ""  # the JSON file it writes to its folder, without ending


@dataclass
class Result:
    """What came of a part; `problem` is empty if all of it went well."""

    name: str
    command: str
    problem: str
    seconds: float
    rows: list[tuple[str, str]] = field(default_factory=list)  # a row's name, and its figures in words
    report: Any = None
    output: str = ""  # its end, if something failed


def main(argv: list[str]) -> int:
    """Run all parts, whatever becomes of each, and report."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install DIR/*.whl, without dependencies")
    parser.add_argument("--check", action="store_true", help="try this command on the CPU, everything tiny")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"PYTHONPATH": path(Path(scratch) / "packages")}
        if options.check:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            if options.wheels:
                install(options.wheels, Path(scratch) / "packages")
            facts = probe(environment)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            print(f"error: {said.strip()[-TAIL:]}", file=sys.stderr)
            return 2
        if not facts["device"] and not options.check:
            print(
                f"error: torch {facts['torch']} finds no CUDA device; one is needed; --check tries the command without",
                file=sys.stderr,
            )
            return 2
        facts |= {"device": CHECK} if options.check else {"driver": driver()}
        parts = tiny_parts() if options.check else gpu_parts()
        results = run_parts(parts, Path(scratch) / "parts", environment, may_skip=options.check)
    facts |= {
        "command": shlex.join(["bash", "gpu.sh", *(Path(word).name if os.sep in word else word for word in argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": f"{sum(result.seconds for result in results):.0f}",
    }
    write(options.output, "check" if options.check else "gpu", facts, results)
    return int(any(result.problem for result in results))


def gpu_parts() -> list[Part]:
    """What is run on a GPU."""
    return [
        tests(130),
        benchmark("training", 220, "--device=cuda", "--batch=16", "--rounds=1", "--steps=10", "--warmup=3"),
        benchmark("planning", 60, "--device=cuda"),
        benchmark("evaluation", 60, "--device=cuda", "--images=32", "--warmup=8", "--rounds=1"),
        benchmark("saving", 60, "--rounds=1", report="saving"),
    ]


def tiny_parts() -> list[Part]:
    """The same commands where there is no GPU, as small as they get."""
    training = ("--batch=1", "--size=32", "--outputs=5", "--only=ours, fp32", "--only=peer, fp32")
    once = ("--device=cpu", "--rounds=1", "--warmup=1")
    return [
        tests(140),
        benchmark("training", 120, *once, "--steps=1", *training, report="training-cpu"),
        benchmark(
            "planning",
            120,
            "--device=cpu",
            "--only=ZeRO-0, bf16, 1 rank",
            "--size=32",
            "--width=0.1",
            report="planning-cpu",
        ),
        benchmark("evaluation", 120, *once, "--images=1", "--width=0.1", report="evaluation-cpu"),
        benchmark("saving", 120, "--rounds=1", "--width=0.1", report="saving"),
    ]


def tests(limit: float) -> Part:
    """All tests marked gpu, from the files that have some: others may need packages that are not there."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]
    return Part("tests", ("-m", "pytest", "-q", "-m", "gpu", "--slow", f"--junitxml={JUNIT}", *marked), limit)


def benchmark(name: str, limit: float, *options: str, report: str = "") -> Part:
    """A benchmark that leaves out what it has no time for."""
    own_limit = f"--time-limit={limit - SPARE:.0f}"
    return Part(name, (f"benchmarks/{name}.py", *options, own_limit, "--output=."), limit, report or f"{name}-cuda")


def install(wheels: Path, target: Path) -> None:
    """Unpack all wheels of a folder, whatever they ask for."""
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"{wheels} has no *.whl; a folder of wheels is needed; leave --wheels out if all is installed")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(target), *files]
    subprocess.run(command, check=True, capture_output=True, text=True)


def path(packages: Path) -> str:
    """Where Python looks: unpacked wheels, this checkout, and what was asked for already."""
    return os.pathsep.join([str(packages), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def probe(environment: dict[str, str]) -> dict[str, Any]:
    """What torch says of itself and the device."""
    command = [sys.executable, "-c", PROBE]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    facts: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return facts | {"Python": sys.version.split()[0]}


def driver() -> str:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.CalledProcessError):
        return "not known"


def run_parts(parts: list[Part], folder: Path, environment: dict[str, str], may_skip: bool) -> list[Result]:
    """Every part, as long as there is time; `may_skip` lets all tests be skipped."""
    deadline, results = time.monotonic() + TOTAL, []
    for part in parts:
        print(f"{part.name}: {shlex.join(part.arguments)}", flush=True)
        results.append(run_part(part, folder / part.name, environment, deadline - time.monotonic(), may_skip))
        print(f"{part.name}: {results[-1].problem or 'done'} ({results[-1].seconds:.0f} s)", flush=True)
    return results


def run_part(part: Part, folder: Path, environment: dict[str, str], left: float, may_skip: bool) -> Result:
    """One part in a group of processes of its own, which ends with it."""
    folder.mkdir(parents=True)
    arguments = [word.replace(f"--junitxml={JUNIT}", f"--junitxml={folder / JUNIT}") for word in part.arguments]
    arguments = [word.replace("--output=.", f"--output={folder}") for word in arguments]
    limit, began = max(0.0, min(part.limit, left)), time.monotonic()
    problem, output = "", ""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        problem = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"not done after {limit:.0f} s"
        process.terminate()  # it ends what it has started, in groups of their own
        with suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=ENDS_WITHIN)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = Result(part.name, shlex.join(["python", *part.arguments]), problem, time.monotonic() - began)
    try:
        if part.report:
            read_report(result, json.loads((folder / f"{part.report}.json").read_text()))
        else:
            read_tests(result, (folder / JUNIT).read_text(), may_skip)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        result.problem = result.problem or f"no result: {error}"
    result.output = output[-TAIL:] if result.problem else ""
    return result


def read_tests(result: Result, junit: str, may_skip: bool) -> None:
    """How many passed, and what became of those that did not. No test that passed is a failure of its own."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind != "passed":
            result.rows.append((f"{case.get('classname')}::{case.get('name')}", kind))
    result.report = counts
    result.rows.insert(0, ("marked gpu", ", ".join(f"{count} {kind}" for kind, count in counts.items())))
    if not counts["passed"] and not may_skip:
        result.problem = result.problem or "no test passed"


def read_report(result: Result, report: dict[str, Any]) -> None:
    """A benchmark's tables, row by row; a row without figures makes the part a failed one."""
    result.report = report
    for table in report["tables"]:
        for name, *cells in table["rows"]:
            columns = table["columns"][1:]
            figures = ", ".join(f"{column}: {cell}" for column, cell in zip(columns, cells, strict=True) if cell)
            result.rows.append((f"{table['title']}: {name}", figures))
    missing = [one["name"] for one in report["measured"] if one["problem"] or not one["rounds"]]
    if missing:
        result.problem = result.problem or f"without figures: {'; '.join(missing)}"


def write(output: Path, name: str, facts: dict[str, Any], results: list[Result]) -> None:
    """`NAME.json` with everything, and `NAME.md` with one table."""
    output.mkdir(parents=True, exist_ok=True)
    tree = {"facts": facts, "parts": [asdict(result) for result in results]}
    (output / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n")
    (output / f"{name}.md").write_text(markdown(facts, results))
    print(f"written: {output / name}.json and .md")


def markdown(facts: dict[str, Any], results: list[Result]) -> str:
    """Facts, and a table with a row of each part's own result and one of each of its rows."""
    lines = [f"- {fact}: {value}" for fact, value in facts.items() if value is not None]
    lines += ["", "| part | row | result |", "| --- | --- | --- |"]
    for result in results:
        outcome = f"FAILED: {result.problem}" if result.problem else "done"
        lines.append(f"| {result.name} | whole | {outcome}, {result.seconds:.0f} s |".replace("\n", " "))
        lines += [f"| {result.name} | {cell(name)} | {cell(figures)} |" for name, figures in result.rows]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text that does not break a table."""
    return text.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
