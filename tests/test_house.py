"""The layout of the package: which part imports which, what is read, what is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from layers import (
    FORBIDDEN,
    LAYERS,
    MOST_FILES_IN_BENCHMARK,
    MOST_LINES_OF_A_FILE,
    MOST_LINES_OF_A_FUNCTION,
)

import ttt_plugins as tp

PACKAGE = Path(tp.__file__).parent

FILES = sorted(p for p in PACKAGE.rglob("*.py") if "hub_cards" not in p.parts)


def dotted(path):
    """("train", "mgg") for ttt_plugins/train/mgg.py; () for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def label(path):
    return "/".join(path.relative_to(PACKAGE).parts)


def imports(tree, path):
    """Modules of ours that a module imports, as tuples of names; those inside functions too."""
    package = ("ttt_plugins", *path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module.split(".") if node.module else []))
            found += [(*base, alias.name) for alias in node.names]
    return [names[1:] for names in found if names[0] == "ttt_plugins" and len(names) > 1]


LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_part_imports_only_parts_before_it(path):
    name = dotted(path)
    if not name or name == ("__main__",):
        return  # the entry points may import everything
    own = name[0]
    assert own in LEVELS, f"{own} is not in LAYERS"
    for part, *_ in imports(ast.parse(path.read_text()), path):
        assert part in LEVELS, f"{label(path)} imports {part} of the package itself"
        if part != own:
            assert LEVELS[part] < LEVELS[own], f"{label(path)} imports {part}, which is after it"
            assert part not in FORBIDDEN.get(own, ()), f"{label(path)} must not import {part}"


def test_every_part_in_the_layers_exists():
    # Otherwise the test above could look in the wrong place.
    assert {dotted(p)[0] for p in FILES if dotted(p)} - {"__main__"} == set(LEVELS)


def test_no_modules_import_each_other_in_a_circle():
    modules = {dotted(p): p for p in FILES if p.stem != "__init__"}
    arrows = {
        name: {
            next(target[:n] for n in (len(target), len(target) - 1) if target[:n] in modules)
            for target in imports(ast.parse(path.read_text()), path)
            if target in modules or target[:-1] in modules
        }
        - {name}
        for name, path in modules.items()
    }
    while arrows:
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"in circles: {sorted('.'.join(n) for n in arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_and_functions_fit_one_sitting(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE, label(path)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{label(path)}: {node.name} has {lines}"


def test_the_benchmark_has_few_files():
    files = [p for p in (PACKAGE / "benchmark").glob("*.py") if p.stem != "__init__"]
    assert len(files) <= MOST_FILES_IN_BENCHMARK


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_pickle_is_read(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            assert not names & {"pickle", "joblib", "dill", "cloudpickle", "shelve"}
    for node, name in calls(tree):
        keywords = {k.arg: k.value for k in node.keywords}
        if name == "torch.load":
            only = keywords.get("weights_only")
            assert isinstance(only, ast.Constant), ast.unparse(node)
            assert only.value is True, ast.unparse(node)
        if name.endswith(("np.load", "numpy.load")):
            allowed = keywords.get("allow_pickle")
            assert allowed is None or allowed.value is False, ast.unparse(node)
        assert name not in ("eval", "exec", "torch.jit.load", "os.system")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_robustbench_is_imported_in_one_place(path):
    if dotted(path) == ("utils", "robustbench"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith(("robustbench", "autoattack")) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert not (node.module or "").startswith(("robustbench", "autoattack"))


def test_methods_know_no_architectures():
    for path in (PACKAGE / "methods").glob("*.py"):
        tree = ast.parse(path.read_text())
        for text in docstrings(tree):
            text.value = ""  # prose may name them
        words = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        for word in (w for w in words if isinstance(w, str)):
            assert not any(part in word for part in ("layer4", "blocks.", "stages.")), word


def docstrings(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node):
            yield node.body[0].value


@pytest.mark.parametrize("path", FILES, ids=label)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    if path.stat().st_size:
        assert ast.get_docstring(tree), "the module says nothing about itself"
    exported = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = set(ast.literal_eval(node.value))
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in exported:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("name", tp.__all__)
def test_what_all_names_is_there(name):
    assert getattr(tp, name) is not None


def test_an_adapters_methods_are_documented():
    for name, member in vars(tp.Adapter).items():
        if not name.startswith("_") and callable(member):
            assert member.__doc__, name


def test_every_field_is_documented_where_it_is_defined():
    import dataclasses

    from ttt_plugins.cli.flags import _documented
    from ttt_plugins.core.registry import get_method
    from ttt_plugins.train.byol import ByolRecipe
    from ttt_plugins.train.joint import HeadRecipe, JointRecipe
    from ttt_plugins.train.mgg import MGGRecipe
    from ttt_plugins.train.mt3 import MT3Recipe
    from ttt_plugins.train.source import SourceRecipe

    recipes = (ByolRecipe, HeadRecipe, JointRecipe, MGGRecipe, MT3Recipe, SourceRecipe)
    for cls in [*(get_method(m).config for m in tp.list_methods()), *recipes]:
        assert {f.name for f in dataclasses.fields(cls)} <= _documented(cls).keys(), cls
        assert cls.__dataclass_params__.frozen


def test_methods_cite_their_papers():
    from ttt_plugins.core.registry import get_method

    for name in set(tp.list_methods()) - {"source"}:
        record = get_method(name)
        assert "arXiv" in record.citation
        assert record.name == name
        assert get_method(record.config()) is record


def test_tests_import_no_package_called_tests():
    # RobustBench installs one.
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(n.split(".")[0] == "tests" for n in names), path.name


def test_importing_brings_no_optional_package_and_leaves_ctrl_c_alone():
    code = (
        "import signal, sys\n"
        "before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
        "import ttt_plugins, ttt_plugins.cli\n"
        "assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(loaded & {'robustbench', 'autoattack', 'matplotlib', 'pyarrow', 'pandas',\n"
        "    'torch_ttt', 'transformers', 'open_clip'}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=True,
    )
    assert done.stdout.strip() == "[]"
