"""The shape of the house (design.md): who may import whom, what is read, what is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ttt_plugins as tp

PACKAGE = Path(tp.__file__).parent

#: A room imports only rooms above it. A new module needs a place here.
ROOMS = (
    "errors",
    "version",
    "flags",
    "data",
    "networks",
    "structure",
    "backbone",
    "scope",
    "views",
    "objectives",
    "gradient_memory",
    "heads",
    "memory",
    "updates",
    "registry",
    "methods",
    "adapter",
    "trust",
    "results",
    "artifacts",
    "hub",
    "models",
    "cards",
    "info",
    "publish",
    "wrapping",
    "testing",
    "convert",
    "train",
    "robustbench_bridge",
    "hosts",
    "benchmark",
    "demo",
    "cli",
)
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "hub_cards" not in p.parts)


def dotted(path):
    """("train", "mgg") for ttt_plugins/train/mgg.py; () for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def label(path):
    return "/".join(path.relative_to(PACKAGE).parts)


def imports(tree, path):
    """Rooms of ours that a module imports as it is loaded; imports inside functions are free."""
    package = ("ttt_plugins", *path.relative_to(PACKAGE).parts[:-1])
    todo, found = [tree], []
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = [*base, *(node.module.split(".") if node.module else [])]
            found += [[*base, alias.name] for alias in node.names]
    return [names[1] for names in found if names[0] == "ttt_plugins" and len(names) > 1]


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_room_imports_only_rooms_above_it(path):
    name = dotted(path)
    if not name or name == ("__main__",):
        return  # the front doors see everything
    assert name[0] in ROOMS, f"{name[0]} has no place in ROOMS"
    place = ROOMS.index(name[0])
    for room in imports(ast.parse(path.read_text()), path):
        assert room in ROOMS, f"{label(path)} imports {room} of the package itself"
        assert ROOMS.index(room) <= place, f"{label(path)} imports {room}, which is below it"


def test_there_are_no_empty_rooms():
    # Otherwise the test above could look in the wrong place.
    assert {dotted(p)[0] for p in FILES if dotted(p)} - {"__main__"} == set(ROOMS)


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
            assert isinstance(only, ast.Constant) and only.value is True, ast.unparse(node)
        if name.endswith(("np.load", "numpy.load")):
            allowed = keywords.get("allow_pickle")
            assert allowed is None or allowed.value is False, ast.unparse(node)
        assert name not in ("eval", "exec", "torch.jit.load", "os.system")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_robustbench_is_imported_in_one_place(path):
    if path.stem == "robustbench_bridge":
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
    import inspect

    from ttt_plugins.core.registry import get_method
    from ttt_plugins.train.mgg import MGGRecipe
    from ttt_plugins.train.source import SourceRecipe

    for cls in [*(get_method(m).config for m in tp.list_methods()), MGGRecipe, SourceRecipe]:
        text = inspect.getdoc(cls)
        for field in dataclasses.fields(cls):
            assert f"{field.name}:" in text or f"{field.name}, " in text, (cls, field.name)
        assert cls.__dataclass_params__.frozen


def test_methods_cite_their_papers():
    from ttt_plugins.core.registry import get_method

    for name in set(tp.list_methods()) - {"source"}:
        record = get_method(name)
        assert "arXiv" in record.citation
        assert record.name == name and get_method(record.config()) is record


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


def test_importing_brings_no_optional_package():
    code = (
        "import sys, ttt_plugins, ttt_plugins.cli\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(loaded & {'robustbench', 'autoattack', 'matplotlib', 'pyarrow', 'pandas',\n"
        "    'torch_ttt'}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=True,
    )
    assert done.stdout.strip() == "[]"
