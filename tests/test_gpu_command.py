"""The command for all that needs a GPU: every part runs, what failed is told, and no figure is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
from gpu import Part, Result, benchmark, markdown, read_report, read_tests, run_parts

REPORT = {
    "tables": [
        {"title": "a step", "columns": ["", "step ms", "MFU %"], "rows": [["ours", "12", "41"], ["peer", "", ""]]}
    ],
    "measured": [{"name": "ours", "problem": "", "rounds": [{}]}, {"name": "peer", "problem": "", "rounds": [{}]}],
}
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="good"/>
<testcase classname="tests.test_a" name="bad"><failure/></testcase>
<testcase classname="tests.test_b" name="broken"><error/></testcase>
<testcase classname="tests.test_b" name="left_out"><skipped/></testcase>
</testsuite></testsuites>"""


def script(name: str, text: str, limit: float = 20, report: str = "r") -> Part:
    return Part(name, ("-c", f"import sys, time; {text}", "--output=."), limit, report)


def write_report(report: object = REPORT) -> str:
    return f"open(sys.argv[1].partition('=')[2] + '/r.json', 'w').write({json.dumps(report)!r})"


def test_all_parts_are_run_and_those_that_fail_are_told(tmp_path: Path) -> None:
    incomplete = {**REPORT, "measured": [{"name": "peer", "problem": "out of memory", "rounds": []}]}
    parts = [
        script("crashes", "print('oh dear'); sys.exit(3)"),
        script("hangs", "print('begun', flush=True); time.sleep(60)", limit=1),
        script("writes and fails", f"{write_report()}; sys.exit(1)"),
        script("silent", "pass"),
        script("incomplete", write_report(incomplete)),
        script("works", write_report()),
    ]
    results = {result.name: result for result in run_parts(parts, tmp_path, dict(os.environ), may_skip=False)}
    problems = {name: result.problem for name, result in results.items()}
    assert problems["crashes"] == "exit code 3" and "oh dear" in results["crashes"].output
    assert problems["hangs"] == "not done after 1 s"
    assert problems["writes and fails"] == "exit code 1" and results["writes and fails"].rows
    assert problems["silent"].startswith("no result: ")
    assert problems["incomplete"] == "without figures: peer"
    assert problems["works"] == "" and results["works"].rows[0] == ("a step: ours", "step ms: 12, MFU %: 41")
    text = markdown({"device": "a loom"}, list(results.values()))
    assert text.count("FAILED") == 5 and "| works | a step: ours | step ms: 12, MFU %: 41 |" in text


def test_no_part_is_begun_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TOTAL", 0.0)
    (result,) = run_parts([script("late", write_report())], tmp_path, dict(os.environ), may_skip=False)
    assert result.problem == "not done after 0 s"


def test_parts_fit_the_time_that_is_allowed() -> None:
    parts = gpu.gpu_parts()
    assert sum(part.limit for part in parts) <= gpu.TOTAL < 9 * 60
    for part in parts[1:]:  # a benchmark reports what it has before it is ended
        assert f"--time-limit={part.limit - gpu.SPARE:.0f}" in part.arguments


def test_tests_are_counted_and_those_that_did_not_pass_are_named() -> None:
    result = Result("tests", "", "", 1.0)
    read_tests(result, JUNIT, may_skip=False)
    assert result.rows[0] == ("marked gpu", "1 passed, 2 failed, 1 skipped")
    assert ("tests.test_a::bad", "failed") in result.rows and ("tests.test_b::left_out", "skipped") in result.rows


def test_tests_that_are_all_skipped_prove_nothing() -> None:
    for may_skip, problem in ((False, "no test passed"), (True, "")):
        result = Result("tests", "", "", 1.0)
        read_tests(result, '<testsuite><testcase name="a"><skipped/></testcase></testsuite>', may_skip)
        assert result.problem == problem


def test_a_row_without_figures_fails_its_part() -> None:
    result = Result("training", "", "", 1.0)
    read_report(result, {**REPORT, "measured": [{"name": "late", "problem": "not measured", "rounds": []}]})
    assert result.problem == "without figures: late" and len(result.rows) == 2


def test_every_file_with_a_test_marked_gpu_is_run() -> None:
    arguments = gpu.tests(1).arguments
    assert "tests/test_predict.py" in arguments and "tests/test_keys.py" not in arguments


def test_a_benchmark_that_is_run_exists() -> None:
    assert (gpu.ROOT / benchmark("training", 60).arguments[0]).is_file()


def test_without_a_device_nothing_is_run_and_nothing_written(tmp_path: Path) -> None:
    command = ["bash", str(gpu.ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(tmp_path / "out"), "--wheels", str(tmp_path), "--check"]) == 2
    assert "has no *.whl" in capsys.readouterr().err


def test_wheels_are_unpacked_where_python_finds_them_first(tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    write_wheel(wheel)
    gpu.install(wheel.parent, tmp_path / "packages")
    environment = os.environ | {"PYTHONPATH": gpu.path(tmp_path / "packages")}
    found = subprocess.run(
        [sys.executable, "-c", "import tiny; print(tiny.ANSWER)"], env=environment, capture_output=True, text=True
    )
    assert found.stdout.strip() == "42"


def write_wheel(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", "ANSWER = 42\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")


@pytest.mark.slow
def test_the_whole_command_works_where_there_is_no_device(tmp_path: Path) -> None:
    command = ["bash", str(gpu.ROOT / "benchmarks" / "gpu.sh"), str(tmp_path), "--check"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "gpu.md").exists()  # what the CPU did is never taken for a GPU's
    tree = json.loads((tmp_path / "check.json").read_text())
    assert tree["facts"]["device"] == gpu.CHECK
    assert [part["name"] for part in tree["parts"]] == ["tests", "training", "planning", "evaluation", "saving"]
    assert "ours, fp32" in (tmp_path / "check.md").read_text()
