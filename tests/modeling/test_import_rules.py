"""The import rules and house rules of the whole checkout, read from the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gppc", "modeling_gppc", "data_scripts", "hub_card")
SHIPPED = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])
TRAVELLING = sorted(path for path in (ROOT / "modeling_gppc").glob("*.py") if path.name != "__init__.py")
ALLOWED_TO_TRAVEL = {"numpy", "torch", "transformers", "huggingface_hub"}
CENSUS = {"cellxgene_census", "tiledbsoma", "tiledb"}
# Libraries that a module of ours must not hide.
LIBRARIES = {
    *sys.stdlib_module_names,
    *(
        "accelerate",
        "anndata",
        "datasets",
        "evaluate",
        "gradio",
        "h5py",
        "huggingface_hub",
        "hypothesis",
        "matplotlib",
    ),
    *("numpy", "pandas", "pyarrow", "pytest", "safetensors", "scanpy", "scipy", "sklearn", "tiledbsoma", "tokenizers"),
    *("torch", "tqdm", "transformers", "trl", "yaml"),
}
# Modules whose printed lines are their purpose.
MAY_PRINT = {"cli.py", "train.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(), filename=str(path))


def imports(path):
    """Absolute names of everything a file imports, at any depth, with the level of `from .x import y` kept."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                # `from package import module` imports package.module.
                found += [(f"{node.module}.{alias.name}", 0) for alias in node.names]
            else:
                package = path.relative_to(ROOT).parent.parts
                base = package[: len(package) - node.level + 1]
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                found += [(".".join([*base, module]), node.level) for module in modules]
    return found


def test_there_is_something_to_check():
    names = {name_of(path) for path in SHIPPED}
    assert {
        "modeling_gppc/modeling_gppc.py",
        "data_scripts/pairs/schema.py",
        "modeling_gppc/inference/predict.py",
    } <= names
    travelling = {path.name for path in TRAVELLING}
    assert {"configuration_gppc.py", "modeling_gppc.py", "feature_extraction_gppc.py"} <= travelling


@pytest.mark.parametrize("path", TRAVELLING, ids=name_of)
def test_what_travels_imports_little(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            tops = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            tops = [node.module.split(".")[0]]
        elif isinstance(node, ast.ImportFrom):
            # Only `from .x import y` is found by those who copy the files to the Hub.
            assert node.level == 1, f"line {node.lineno}"
            assert node.module is not None, f"line {node.lineno}"
            assert (ROOT / "modeling_gppc" / f"{node.module}.py") in TRAVELLING, f"line {node.lineno}: {node.module}"
            continue
        else:
            continue
        for top in tops:
            assert top in sys.stdlib_module_names or top in ALLOWED_TO_TRAVEL, f"line {node.lineno} imports {top}"


# Rooms of the house, lowest first: a module imports from its own room and from those below it.
ROOMS = (
    ("data_scripts", "modeling_gppc.normalization_gppc"),
    ("data_scripts.cells",),
    ("data_scripts.store",),
    ("data_scripts.pairs",),
    ("data_scripts.batches",),
    ("data_scripts.synthetic",),
    ("modeling_gppc",),
    ("modeling_gppc.fitting",),
    ("modeling_gppc.training", "modeling_gppc.evaluation", "modeling_gppc.inference"),
    ("hub_card",),
    ("gppc", "train"),
)
STRANGERS = {"modeling_gppc.training", "modeling_gppc.evaluation"}
# What still imports upwards. This list may only shrink: nothing is to be added here.
UPWARDS = {
    ("modeling_gppc/training/trainer.py", "hub_card"),
}


def room_of(module):
    """The room with the longest name that the module is in, and its height."""
    found = [
        (room, height) for height, rooms in enumerate(ROOMS) for room in rooms if f"{module}.".startswith(f"{room}.")
    ]
    return max(found, key=lambda pair: len(pair[0]))


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_rooms_import_downwards(path):
    room, height = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, _ in imports(path):
        if name.split(".")[0] not in PACKAGES:
            continue
        other, other_height = room_of(name)
        upwards = other_height > height or {room, other} == STRANGERS
        assert not upwards or (name_of(path), other) in UPWARDS, (
            f"{room} imports {name}, which stands above or beside it"
        )


def test_the_height_of_rooms():
    heights = [
        room_of(name)[1] for name in ("data_scripts.options", "data_scripts.cells.screens", "modeling_gppc.x_gppc")
    ]
    assert heights == sorted(heights) and len(set(heights)) == 3
    assert room_of("modeling_gppc.normalization_gppc.close_matches")[1] == 0
    assert room_of("modeling_gppc.training")[0] in STRANGERS


def test_metrics_import_numpy_only():
    for name, _ in imports(ROOT / "modeling_gppc/evaluation/metrics.py"):
        top = name.split(".")[0]
        assert top == "numpy" or top in sys.stdlib_module_names, name


def modules_reached(start):
    """The checkout's files that importing `start` loads, following imports at the top of modules."""
    reached, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        tree = tree_of(path)
        for node in top_level(tree):
            for module in absolute_modules(path, node):
                waiting += [file for file in files_of(module) if file not in reached]
    return reached


def top_level(tree):
    """Statements that run on import: not those inside functions."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def absolute_modules(path, node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = path.relative_to(ROOT).parent.parts
    base = list(package[: len(package) - node.level + 1]) if node.level else []
    stem = ".".join([*base, *([node.module] if node.module else [])])
    return [stem, *(f"{stem}.{alias.name}" for alias in node.names)]


def files_of(module):
    parts = module.split(".")
    if parts[0] not in PACKAGES and len(parts) > 1:
        return []
    candidates = [ROOT.joinpath(*parts).with_suffix(".py")]
    candidates += [ROOT.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    return [file for file in candidates if file in SHIPPED]


def census_reached(start):
    """Files that importing `start` loads and that import the Census."""
    return {
        name_of(path)
        for path in modules_reached(start)
        for node in top_level(tree_of(path))
        if {module.split(".")[0] for module in absolute_modules(path, node)} & CENSUS
    }


def test_the_walk_finds_census_code_where_it_is():
    assert "data_scripts/store/census_layout.py" in census_reached(ROOT / "data_scripts/store/census_obs.py")


@pytest.mark.parametrize(
    "start",
    [
        "train.py",
        "gppc/cli.py",
        "modeling_gppc/inference/predict.py",
        "data_scripts/batches/data_collator.py",
    ],
)
def test_these_load_no_census_code(start):
    assert census_reached(ROOT / start) == set()


def test_train_names_no_census_code():
    names = [name for name, _ in imports(ROOT / "train.py")]
    assert names
    assert not [name for name in names if name.split(".")[0] in CENSUS or "census" in name.split(".")[-1].casefold()]


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_imports_the_entry_points(path):
    for name, _ in imports(path):
        assert name.split(".")[0] != "train", name
        assert not name.startswith("gppc.cli"), name


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_no_module_hides_a_library(path):
    if path.name == "__init__.py":
        assert path.parent.name not in LIBRARIES
    else:
        assert path.stem not in LIBRARIES


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_house_rules(path):
    tree = tree_of(path)
    docstring = ast.get_docstring(tree)
    assert docstring, "a module says what it is for"
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{line}: `assert` vanishes under -O; raise a ValueError"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{line}: bare `except`"
        if isinstance(node, ast.Name):
            assert not node.id.startswith("NotImplemented"), line
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in names}, f"{line}: pickle"
        if isinstance(node, ast.Attribute) and node.attr in ("append", "insert", "extend"):
            assert ast.unparse(node.value) != "sys.path", f"{line}: sys.path is the user's"
    if not path.stem.endswith("cli") and path.name not in MAY_PRINT and path.parent.name in PACKAGES:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_no_mark_of_one_machine(path):
    """Marks of unfinished work are ruff's (`FIX`)."""
    text = path.read_text()
    for place in (Path.home(), ROOT.parent):
        assert place == Path(place.anchor) or f"{place}/" not in text, place


def test_tests_have_names_of_their_own():
    """Without packages, two test files of one name would hide each other."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))
