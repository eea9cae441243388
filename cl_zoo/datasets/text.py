"""Where text comes from: Python's own library, local folders."""

from __future__ import annotations

import ast
import io
import itertools
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cl_zoo.checks import Count, checked

__all__ = ["bare_code", "docstrings", "python_library", "read_text_domains"]

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TABLES = {"encodings", "pydoc_data"}  # characters, and help pages in one literal: neither is code
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@checked
def python_library(limit: Count | None = 1_000_000) -> dict[str, bytes]:
    """Two domains that every machine has: Python's standard library as installed, its code and its documentation.

    Files are read in the order of their names, without tests, tables (`encodings`, `pydoc_data`), installed packages,
    and what does not decode or parse.

    Args:
      limit: bytes of each domain, at which it is cut; None reads the whole library, which takes tens of seconds.

    Returns:
      "code": sources without docstrings and comments; "docstrings": English text, with empty lines between. Equal on
      one machine and version of Python, not across them.

    Raises:
      ValueError: an impossible limit.
      FileNotFoundError: a Python without the sources of its library.

    Example:
      >>> {name: len(text) for name, text in python_library(limit=1000).items()}
      {'code': 1000, 'docstrings': 1000}
    """
    return dict(_library(limit))


@cache
def _library(limit: int | None) -> tuple[tuple[str, bytes], ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    readers = {"code": bare_code, "docstrings": docstrings}
    found = {name: bytearray() for name in readers}
    for path in _sources(folder):
        wanted = [name for name, text in found.items() if limit is None or len(text) < limit]
        if not wanted:
            break
        try:
            with tokenize.open(path) as file:  # in the encoding that the file itself names
                source = file.read()
            new = {name: readers[name](source).encode("utf-8", "replace") for name in wanted}
        except (SyntaxError, ValueError, tokenize.TokenError):  # does not decode (a ValueError), or is not Python
            continue
        for name, text in new.items():
            found[name] += text
    if not all(found.values()):
        raise FileNotFoundError(f"{folder}: no Python sources of the standard library here; give domains of your own")
    return tuple((name, bytes(text[:limit])) for name, text in found.items())


def _sources(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED | _TABLES]
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, as they stand one after another, an empty line after each.

    Raises:
      SyntaxError, ValueError: not Python.

    Example:
      >>> docstrings('def f():\\n    "Does  nothing."\\n    # so far')
      'Does  nothing.\\n\\n'
    """
    nodes = sorted(_documented(_parse(source)), key=lambda node: node.body[0].lineno)
    return "".join(f"{text}\n\n" for text in map(ast.get_docstring, nodes) if text)


def bare_code(source: str) -> str:
    """A source without docstrings and comments, otherwise as it was written.

    Lines that are left empty go too. A docstring that was all of its body becomes `pass`, so that the rest means what
    it did; a string after it, which would become the docstring, goes with it.

    Raises:
      SyntaxError, ValueError, tokenize.TokenError: not Python.

    Example:
      >>> print(bare_code('def f(x):\\n    "One."\\n    # more\\n    return x + 1  # done\\n'), end="")
      def f(x):
          return x + 1
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    tree = _parse(source)
    lines = source.split("\n")  # not splitlines: Python's lines do not end at form feeds
    edits = []  # (first line, column, last line, column, what comes there instead)
    for node in _documented(tree):
        texts = list(itertools.takewhile(_is_text, node.body))
        empty = len(texts) == len(node.body) and not isinstance(node, ast.Module)  # a module may be empty
        for i, text in enumerate(texts):
            first, last = text.lineno - 1, (text.end_lineno or text.lineno) - 1
            before = len(lines[first].encode()[: text.col_offset].decode())  # ast counts bytes
            after = len(lines[last].encode()[: text.end_col_offset].decode())
            if semicolon := re.match(r"\s*;\s*", lines[last][after:]):
                after += semicolon.end()
            edits.append((first, before, last, after, "pass" if empty and i == 0 else ""))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            edits.append((token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1], ""))
    for first, before, last, after, instead in sorted(edits, reverse=True):
        left = (lines[first][:before] + instead + lines[last][after:]).rstrip()
        continued = first > 0 and lines[first - 1].endswith("\\")  # the next line must not be joined instead
        lines[first : last + 1] = [left] if left or continued else []
    return "\n".join(lines)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sequences that are no escapes
        return ast.parse(source)


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            yield node


@checked
def read_text_domains(directory: str | os.PathLike[str]) -> dict[str, bytes]:
    """Local text: each folder in a directory is a domain, of all files in it and below; each file is one too.

    Names that begin with a dot are skipped. Nothing outside the directory is read.

    Args:
      directory: of the domains.

    Returns:
      Bytes by name of the folder, or of the file without its ending; in the order of names, as are the files of a
      domain, which follow each other without anything between them.

    Raises:
      ValueError, FileNotFoundError: one line that names the path, what is wrong, and what to do.

    Example:
      >>> read_text_domains("texts").keys()  # doctest: +SKIP
      dict_keys(['english', 'german'])
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; directory must be that of the domains")
    domains: dict[str, bytes] = {}
    for entry in _entries(root):
        name = entry.name if entry.is_dir() else entry.stem
        if name in domains:
            raise ValueError(f"{entry}: a second domain named {name!r}; rename one of the two")
        domains[name] = b"".join(path.read_bytes() for path in _files(entry, root.resolve()))
        if not domains[name]:
            raise ValueError(f"{entry}: no text in it; remove it, or put some there")
    if not domains:
        raise ValueError(f"{root}: nothing in it; put a folder or a file of each domain there")
    return domains


def _entries(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def _files(path: Path, root: Path) -> Iterator[Path]:
    """The files at and below a path, none of them outside the root."""
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"{path}: a link that leads nowhere; remove it") from error
    if not inside:
        raise ValueError(f"{path}: a link to a place outside {root}; copy what it names instead")
    if path.is_symlink() and path.is_dir():
        raise ValueError(f"{path}: a link to a folder; copy what it names instead")
    if path.is_dir():
        for entry in _entries(path):
            yield from _files(entry, root)
    elif path.is_file():
        yield path
    else:
        raise ValueError(f"{path}: neither a file nor a folder; remove it")
