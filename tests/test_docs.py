"""Examples in README.md, docs/ and docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import frog_cuda

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    "frog_cuda",
    *(m.name for m in pkgutil.walk_packages(frog_cuda.__path__, "frog_cuda.") if not m.name.endswith(("._C", "._C_cuda"))),
]


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Blocks fenced as ```python, each with the number of its first line."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in found]


def run_page(text: str, name: str) -> int:
    """Executes the blocks of a page one after the other, as a reader would type them, and returns how many there are."""
    names: dict[str, object] = {"__name__": name}
    blocks = python_blocks(text)
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, name, "exec"), names)  # empty lines: a traceback shows the page's own numbers
    return len(blocks)


@pytest.fixture(autouse=True)
def same_numbers() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(page.read_text(), page.name) >= 1


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the captured output"


def test_docstrings_are_found() -> None:
    finder = doctest.DocTestFinder()
    examples = {t.name for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples}
    for name in ("ForwardGradient", "forward_gradient"):
        assert f"frog_cuda.forward_gradient.{name}" in examples


def test_a_wrong_example_fails() -> None:
    with pytest.raises(AssertionError):
        run_page("text\n```python\nx = 1\n```\nmore\n```python\nassert x == 2\n```\n", "page")
    assert run_page("```python\nx = 1\n```\n```\nnot python\n```\n", "page") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
