"""The plan of the house, read from its source: lengths, and who may import whom."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.common import ROOT

# From the ground up. A folder stands for all its modules that have no floor of their own. A module
# may import from the floors below it and, without a circle, from its own.
FLOORS = """
    utils
    utils.run
    utils.data
    utils.report
    utils.corpus
    transformers
    boundary_policy
    criterion
    segments
    model
    dataset
    augmentation
    stats
    streaming
    feature_loader
    eval
    train
    recipes
    hubconf
    tests.common
    benchmarks
    tests
    conftest
    unit_tests
""".split()

PYTEST_FLOORS = {"tests", "conftest", "unit_tests"}  # these may import it, and may be long
LONGEST_TRAIN, LONGEST_FILE, LONGEST_FUNCTION = 450, 500, 60  # lines


def find_modules():
    """Name of each module -> its path; hidden folders (.venv, .git) aren't searched."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path
        for path in sorted(paths)
    }


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def floor(module):
    """The entry of FLOORS that a module belongs to: its own name, or its closest folder's."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in FLOORS), None)


SOURCES = [name for name in MODULES if floor(name) not in PYTEST_FLOORS]


def imported_by(module):
    """Full names of all that a module imports, inside functions too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module
            if node.level:  # only in the code of exported models, which is a package elsewhere
                assert module.startswith("eval.export_model."), f"{module} imports relatively"
                package = f"eval.export_model.{node.module}"
            for alias in node.names:  # of a package: one of its modules, or a name in it
                full_name = f"{package}.{alias.name}"
                yield full_name if full_name in MODULES else package


IMPORTS = {module: set(imported_by(module)) for module in MODULES}


def test_imports_are_found():
    assert IMPORTS["utils.files"] >= {"os", "utils.misc"}
    assert "utils.torchaudio_import" in IMPORTS["model"]  # imported inside a function
    assert "criterion.fused_scores" in IMPORTS["criterion.sampling"]


def test_every_module_has_a_floor():
    assert [name for name in MODULES if not floor(name)] == []


def test_no_module_imports_upwards():
    """As `tests.helpers` in `benchmarks` would be, or `stats` in `utils.report`."""
    height = {name: FLOORS.index(floor(name)) for name in MODULES if floor(name)}
    upwards = [
        f"{name} imports {other}"
        for name in height
        for other in sorted(IMPORTS[name] & height.keys())
        if height[other] > height[name]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter({name: IMPORTS[name] & MODULES.keys() for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_only_tests_import_pytest():
    assert [name for name in SOURCES if "pytest" in IMPORTS[name]] == []


def test_no_file_is_long():
    lengths = {name: len(MODULES[name].read_text().splitlines()) for name in SOURCES}
    assert lengths["train"] <= LONGEST_TRAIN
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def test_no_function_is_long():
    """Counted from the first decorator to the last line."""
    too_long = {}
    for module in SOURCES:
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
                if node.end_lineno - first >= LONGEST_FUNCTION:
                    too_long[f"{module}.{node.name}"] = node.end_lineno - first + 1
    assert too_long == {}
