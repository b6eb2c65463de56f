"""What `import llmdoctor` offers: every name is there, where type checkers see it, and importing costs nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.metadata import version

import llmdoctor


def test_every_public_name_is_there() -> None:
    for name in llmdoctor.__all__:
        found = getattr(llmdoctor, name)
        assert name == "__version__" or found.__name__ == name
    assert llmdoctor.__version__ == version("llmdoctor")
    assert set(llmdoctor.__all__) == set(dir(llmdoctor)) == {*llmdoctor._HOMES, "__version__"}


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(llmdoctor))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: str(node.module).removeprefix("llmdoctor.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == llmdoctor._HOMES


def test_importing_imports_nothing_heavy() -> None:
    script = "import sys, llmdoctor; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(llmdoctor, "load_nothing")
