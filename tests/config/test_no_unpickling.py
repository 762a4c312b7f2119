"""Nothing in the package loads a file by a way that can run code out of it, or unpacks an archive."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = [Path(__file__).resolve().parents[2] / name for name in ("rlsys", "hydra_plugins")]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
ARCHIVES = {"tarfile", "zipfile"}
CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive", "pandas.read_pickle"}
UNSAFE = {"allow_pickle=True", "weights_only=False", "trust_remote_code=True"}
# Messages between a reward actor and the processes that it started itself, over a socket pair that nobody else has.
ALLOWED = {("rlsys/rewards/channel.py", "pickle")}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from package.rglob("*.py")


def used(tree: ast.AST) -> Iterator[str]:
    """What of the above a module imports, calls or asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES | ARCHIVES)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & CALLS
            if (node.module or "").split(".")[0] in MODULES | ARCHIVES:
                yield str(node.module)
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in CALLS:
                yield name
            yield from UNSAFE & {ast.unparse(keyword) for keyword in node.keywords}


def test_loaders_never_unpickle() -> None:
    found = set()
    for path in sources():
        name = path.relative_to(PACKAGES[0].parent).as_posix()
        found |= {(name, what) for what in used(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "torch.load(f)",
        "numpy.load(f, allow_pickle=True)",
        "import tarfile",
        "from shutil import unpack_archive",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_each_way_is_found(code: str) -> None:
    assert list(used(ast.parse(code)))
