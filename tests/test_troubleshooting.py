"""Every message that docs/troubleshooting.md quotes is one that the code prints."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.M)
VARIABLE = "\0"  # in place of what an f-string fills in
# Whose words they are, where they are not ours.
DEEPSPEED, TORCH = (
    "Setting accelerator to CPU. If",
    "The server socket has failed to listen on any local network address.",
)


def texts(source: str) -> list[str]:
    """Every string of a module, f-strings with VARIABLE where they vary."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(_part(value) for value in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def _part(value: ast.expr) -> str:
    return str(value.value) if isinstance(value, ast.Constant) else VARIABLE


OURS = [text for path in (ROOT / "fcn_dist").rglob("*.py") for text in texts(path.read_text())]
OURS += (ROOT / "launch" / "environment.sh").read_text().splitlines()


def is_printed(message: str, strings: list[str]) -> bool:
    """Whether some string is the message, with anything or nothing where that has `...`.

    What a string fills in stands for `...` alone, so that no constant part is taken for a variable one.
    """
    constant = [re.escape(piece) for piece in message.split("...")]
    assert sum(len(piece) for piece in message.split("...")) >= 15, f"{message}: too little to be found by"
    pattern = re.compile(r"[\s\S]*".join(constant))
    return any(pattern.search(text) for text in strings)


@pytest.mark.parametrize("message", [message for message in MESSAGES if not message.startswith((DEEPSPEED, TORCH))])
def test_a_message_is_one_of_ours(message: str) -> None:
    assert is_printed(message, OURS)


def test_a_message_that_is_worded_otherwise_is_not_found() -> None:
    assert is_printed("is in use by ...; one job at a time", OURS)
    assert not is_printed("is in use by ...; one job at any time", OURS)
    assert not is_printed("is in use by process; one job at a time", OURS)


def test_what_deepspeed_says_is_in_deepspeed() -> None:
    (message,) = (message for message in MESSAGES if message.startswith(DEEPSPEED))
    spec = find_spec("deepspeed")
    assert spec and spec.origin
    assert message in (Path(spec.origin).parent / "accelerator" / "real_accelerator.py").read_text()


def test_torch_says_it_where_a_port_is_taken() -> None:
    assert TORCH in MESSAGES
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistNetworkError, match=re.escape(TORCH)):
        TCPStore("127.0.0.1", store.port, is_master=True, wait_for_workers=False)


def test_a_message_stands_on_the_page_once() -> None:
    assert 20 <= len(MESSAGES) == len(set(MESSAGES))
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| message", "| ---"))]
    assert len(rows) == len(MESSAGES)
