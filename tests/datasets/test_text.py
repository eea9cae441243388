"""Text of Python's own library, and of local folders."""

from __future__ import annotations

import ast
import os
import textwrap
import tokenize
from pathlib import Path

import pytest

from cl_zoo.datasets import python_library, read_text_domains
from cl_zoo.datasets.text import _parse, _sources, bare_code, docstrings


def undocumented(source: str) -> str:
    """The tree without the strings that bodies begin with."""
    tree = _parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            had = bool(node.body)
            while node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                if not isinstance(node.body[0].value.value, str):
                    break
                node.body.pop(0)
            if had and not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return ast.dump(tree)


SOURCE = '''\
#!/usr/bin/env python3
# -*- coding: utf-8 -*-
"""Module é
text."""; from __future__ import annotations

x = "# no comment"  # a comment
y = """
# no comment either
"""

class A: "One line."

class B:
    """Only this."""

class C:
    (
        "In brackets, "
        'twice é.'
    )  # why
    z = f"{x}#"; w = 1  # é

    async def f(self):
        # before
        "Doc."; "Next."; return 1

    def g(self): "é"; return 2

    def h(self):
        r"""Raw \\d"""
        "This would be the next docstring."
        "not a docstring".strip()
        """nor this"""
        if self:
            "nor this"
        return (1,  # first
                # second
                2)

    def i(self):
        "All"; "of it."

v = 1 + \\
    2
u = 3 \\
# this ends the line before
t = 4
'''

BARE = '''\
from __future__ import annotations

x = "# no comment"
y = """
# no comment either
"""

class A: pass

class B:
    pass

class C:
    z = f"{x}#"; w = 1

    async def f(self):
        return 1

    def g(self): return 2

    def h(self):
        "not a docstring".strip()
        """nor this"""
        if self:
            "nor this"
        return (1,
                2)

    def i(self):
        pass

v = 1 + \\
    2
u = 3 \\

t = 4
'''


def test_code_without_docstrings_and_comments() -> None:
    assert bare_code(SOURCE) == BARE
    assert bare_code(SOURCE.replace("\n", "\r\n")) == BARE
    assert ast.dump(_parse(BARE)) == undocumented(SOURCE)
    assert bare_code(BARE) == BARE
    assert docstrings(BARE) == ""


def test_docstrings_in_order() -> None:
    want = ["Module é\ntext.", "One line.", "Only this.", "In brackets, twice é.", "Doc.", "é", "Raw \\d", "All"]
    assert docstrings(SOURCE) == "".join(f"{text}\n\n" for text in want)
    indented = 'def f():\n    """First.\n\n        More.\n    Last.\n    """\nclass A:\n    ""\n'
    assert docstrings(indented) == "First.\n\n    More.\nLast.\n\n"


@pytest.mark.parametrize("source", ["", "# only this\n", '"only this"', '"only this";\n', "\f\nx = 1\f# c\n"])
def test_small_sources(source: str) -> None:
    assert ast.dump(_parse(bare_code(source))) == undocumented(source)


def test_the_library_means_what_it_did() -> None:
    """Every twelfth module of the library installed here."""
    import sysconfig

    checked = 0
    for path in _sources(Path(sysconfig.get_path("stdlib")))[::12]:
        with tokenize.open(path) as file:
            source = file.read()
        bare = bare_code(source)
        assert ast.dump(_parse(bare)) == undocumented(source), path
        assert docstrings(bare) == "", path
        checked += 1
    assert checked > 20


def test_python_library() -> None:
    domains = python_library(limit=20_000)
    assert list(domains) == ["code", "docstrings"] and {len(text) for text in domains.values()} == {20_000}
    assert domains == python_library(limit=20_000)
    less = python_library(limit=5000)
    assert all(domains[name].startswith(text) for name, text in less.items())
    code, text = domains["code"].decode(), domains["docstrings"].decode()
    assert code.count("def ") > 20 and '    """' not in code
    assert text.count(" the ") > 50
    less["code"] = b""
    assert python_library(limit=5000)["code"], "what is given out is a copy"


def test_library_skips_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "b.py": b'"Doc b."\nb = 1  # c\n',
        "a.py": b'# coding: latin-1\n"Caf\xe9."\na = 2\n',
        "broken.py": b"def (:\n",
        "zero.py": b"x = 1\x00\n",
        "undecodable.py": b'x = "\xff"\n',
        "a.txt": b"no",
        "pkg/c.py": b'"Doc c."\n',
        "test/d.py": b"no = 1\n",
        "pkg/tests/e.py": b"no = 1\n",
        "site-packages/f.py": b"no = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("cl_zoo.datasets.text.sysconfig.get_path", lambda name: str(tmp_path))
    found = python_library(limit=12_345)  # a limit of its own: results are kept
    assert found == {"code": b"a = 2\nb = 1\n", "docstrings": "Café.\n\nDoc b.\n\nDoc c.\n\n".encode()}
    monkeypatch.setattr("cl_zoo.datasets.text.sysconfig.get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no Python sources of the standard library"):
        python_library(limit=12_346)
    with pytest.raises(ValueError, match="limit is 0"):
        python_library(limit=0)


def test_folders_and_files_are_domains(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    (root / "german" / "deep").mkdir(parents=True)
    (root / "german" / "b.txt").write_bytes(b"zwei\xff")
    (root / "german" / "a.txt").write_bytes(b"eins")
    (root / "german" / "deep" / "0.txt").write_bytes(b"drei")
    (root / "german" / ".hidden").write_bytes(b"no")
    (root / ".git").mkdir()
    (root / "english.txt").write_bytes(b"one")
    (root / "german" / "c.txt").symlink_to(root / "english.txt")
    domains = read_text_domains(root)
    assert list(domains.items()) == [("english", b"one"), ("german", b"einszwei\xffonedrei")]
    (tmp_path / "link").symlink_to(root)
    assert read_text_domains(str(tmp_path / "link")) == domains


def make(root: Path, kind: str) -> None:
    (root.parent / "secret").mkdir()
    (root.parent / "secret" / "s.txt").write_bytes(b"secret")
    if kind != "missing":
        root.mkdir()
        (root / "fine").mkdir()
        (root / "fine" / "a.txt").write_bytes(b"fine")
    if kind == "nothing":
        (root / "fine" / "a.txt").unlink()
        (root / "fine").rmdir()
    elif kind == "empty":
        (root / "empty").mkdir()
        (root / "empty" / "a.txt").touch()
    elif kind == "file link out":
        (root / "fine" / "b.txt").symlink_to(root.parent / "secret" / "s.txt")
    elif kind == "folder link out":
        (root / "other").symlink_to("../secret")
    elif kind == "folder link":
        (root / "fine" / "again").symlink_to("..")
    elif kind == "circle":
        (root / "fine" / "x").symlink_to("y")
        (root / "fine" / "y").symlink_to("x")
    elif kind == "dangling":
        (root / "fine" / "x").symlink_to("none")
    elif kind == "pipe":
        os.mkfifo(root / "fine" / "pipe")
    elif kind == "twice":
        (root / "fine.txt").write_bytes(b"fine")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "texts: no such folder"),
        ("nothing", "texts: nothing in it"),
        ("empty", "empty: no text in it"),
        ("file link out", "b.txt: a link to a place outside"),
        ("folder link out", "other: a link to a place outside"),
        ("folder link", "again: a link to a folder"),
        ("circle", "x: a link that leads nowhere|x: neither a file nor a folder"),
        ("dangling", "x: neither a file nor a folder"),
        ("pipe", "pipe: neither a file nor a folder"),
        ("twice", "fine.txt: a second domain named 'fine'"),
    ],
)
def test_bad_folders_are_refused_in_one_line(kind: str, said: str, tmp_path: Path) -> None:
    root = tmp_path / "texts"
    make(root, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        read_text_domains(root)
    assert "\n" not in str(error.value) and textwrap.dedent(str(error.value)) == str(error.value)
