"""The rules of the house: names, who may import whom, scripts."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

import feats
import modeling

PACKAGES = ("feats", "modeling")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in MODULES}
# Libraries that needn't be installed where the tests run, and names too close to the standard library's.
RESERVED = set(
    "clip torch torchvision transformers datasets evaluate tokenizers select random profile types io code queue signal "
    "copy calendar struct token string platform logging inspect".split()
)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_script(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


def imported(tree: ast.Module) -> set[str]:
    """Everything a module imports, anywhere in it: `from a.b import c` counts as a.b and a.b.c."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


SCRIPTS = [path for path, tree in TREES.items() if is_script(tree)]
each_module = pytest.mark.parametrize("path", MODULES, ids=dotted)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=dotted)


def test_the_rules_see_the_house():
    assert {"feats.store", "feats.extraction.local", "feats.encoders.openai_clip", "modeling.__init__"} <= set(
        map(dotted, MODULES)
    )
    assert "feats.clip_extract_feats" in map(dotted, SCRIPTS) and "feats.store" not in map(dotted, SCRIPTS)
    assert {"feats.store", "feats.store.FeatureStore", "feats.encoders.base"} <= imported(
        TREES[ROOT / "feats" / "extraction" / "local.py"]
    )


def test_this_tree_is_tested():
    for package in (feats, modeling):
        assert Path(package.__file__).parent == ROOT / package.__name__


@cache
def taken() -> set[str]:
    """Names of modules that there are elsewhere: looking up what is installed takes a quarter of a second."""
    return {*sys.stdlib_module_names, *packages_distributions(), *RESERVED} - {"__init__"}


# -- names and imports ------------------------------------------------------------------------------------------


@each_module
def test_no_module_shadows_another(path: Path):
    """A script's folder comes first in sys.path: a file beside it hides any module of that name."""
    assert path.stem not in taken()


@each_module
def test_imports(path: Path):
    tree, names = TREES[path], imported(TREES[path])
    relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative, f"relative imports in lines {relative}"
    siblings = {module.stem for module in MODULES} - {"__init__"}
    assert not siblings & {name.split(".")[0] for name in names}, "imported by sibling name"
    assert not names & set(map(dotted, SCRIPTS)), "a script is imported"
    if path.is_relative_to(ROOT / "feats"):
        assert "modeling" not in {name.split(".")[0] for name in names}, "feats imports modeling"


def test_only_the_local_writer_knows_both_encoders_and_store():
    """Directly; the public names of `feats/__init__.py` are found lazily."""
    both = {
        dotted(path)
        for path, tree in TREES.items()
        if "feats.store" in imported(tree) and any(name.startswith("feats.encoders.") for name in imported(tree))
    }
    assert both == {"feats.__init__", "feats.extraction.local"}


def test_encoding_blocks_knows_no_store_no_bar_and_no_lock(tmp_path: Path):
    """Whoever distributes blocks imports no more than this."""
    unknown = {"feats.store", "feats.cli", "feats.command_line", "h5py"}
    code = f"import sys, feats.extraction.encode; print({unknown} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


ROOMS = sorted(path for path in MODULES if path.name == "__init__.py")
PUBLIC = [ROOT / package / "__init__.py" for package in PACKAGES]  # with lazy names after the docstring


@pytest.mark.parametrize("path", ROOMS, ids=dotted)
def test_a_package_s_init_is_a_docstring(path: Path):
    first, *rest = TREES[path].body
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    assert bool(rest) == (path in PUBLIC)


@pytest.mark.parametrize("path", PUBLIC, ids=dotted)
def test_public_names_are_there_and_loaded_only_when_asked_for(path: Path, tmp_path: Path):
    package = path.parent.name
    code = f"""if True:
        import sys, {package}
        before = sorted(name for name in sys.modules if name.startswith({package!r} + "."))
        print(before, "numpy" in sys.modules)
        homes = {{name: getattr({package}, name) for name in {package}.__all__}}
        print(sorted({package}._HOMES) == sorted({package}.__all__), set({package}.__all__) <= set(dir({package})))
        print(all(getattr(x, "__module__", home) == home for x, home in zip(homes.values(), map({package}._HOMES.get, homes))))
        try:
            {package}.no_such_name
        except AttributeError as error:
            print(error)
    """
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    *facts, error = out.stdout.splitlines()
    assert facts == ["[] False", "True True", "True"]
    assert error.startswith(f"module {package!r} has no attribute 'no_such_name'; it has ")


def test_type_checkers_see_the_public_names():
    (seen,) = (node for node in TREES[ROOT / "feats" / "__init__.py"].body if isinstance(node, ast.If))
    shown = {alias.asname for node in seen.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown == set(feats.__all__)


COMMAND_LINES = [path for path in MODULES if path.name in ("cli.py", "console.py", "terminal.py")]
COMMAND_LINES += [path for path in MODULES if path.parent.name == "command_line"]
LIBRARIES = [path for path in MODULES if path not in SCRIPTS and path not in COMMAND_LINES]


@pytest.mark.parametrize("path", LIBRARIES, ids=dotted)
def test_libraries_know_no_command_line(path: Path):
    """They print nothing, know neither argparse nor options: settings are typed, messages name them in backquotes."""
    tree = TREES[path]
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls and "argparse" not in imported(tree) and "tqdm" not in imported(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "stderr"]
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    options = [text for text in strings if text not in docs and re.search(r"(^|[\s(`])--[a-z]", text)]
    assert not options, "an option's name in a message"


def test_reading_caches_needs_no_torch(tmp_path: Path):
    code = "import sys, feats.errors, feats.records, feats.cli; from feats import FeatureStore; print('torch' in sys.modules, feats.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["False", str(ROOT / "feats" / "__init__.py")]


# -- scripts ----------------------------------------------------------------------------------------------------


@each_script
def test_every_script_has_build_parser_and_main(path: Path, capsys: pytest.CaptureFixture):
    script = importlib.import_module(dotted(path))
    assert script.__doc__ and script.build_parser().description == script.__doc__
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        script.main(["--no-such-option"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("script", ["feats/inspect_feats.py", "feats/clip_extract_feats.py"])
def test_scripts_run_by_path_from_anywhere(tmp_path: Path, script: str):
    out = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert out.stdout.startswith(f"usage: {Path(script).name}")
    assert not list(tmp_path.iterdir())


# -- what git keeps ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("folder", ["data", "saved"])
def test_what_users_put_and_make_is_ignored(folder: str):
    def ignored(name: str) -> bool:
        command = ["git", "check-ignore", "--quiet", "--no-index", f"{folder}/{name}"]
        return {0: True, 1: False}[subprocess.run(command, cwd=ROOT).returncode]

    assert ignored("train.txt") and ignored("feats/clip_train.h5") and ignored("runs/a/head.safetensors")
    assert not ignored("README.md") and (ROOT / folder / "README.md").is_file()
