"""The house has floors: a file imports only what stands on floors below its own, and nothing goes round in a circle.

The imports are read from the source, those inside functions too.
"""

import ast
import functools
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (  # from the bottom; what shares a floor doesn't import each other
    ("errors", "version"),
    ("config", "io"),
    ("images",),
    ("table", "parallel", "tokenizer", "preprocess", "kernels"),
    ("weights", "ops", "cosines", "stages"),
    ("models", "data"),
    ("family", "fast"),
    ("openai", "mobileclip", "siglip"),
    ("names",),
    ("loading",),
    ("save", "embed", "export", "hidden"),
    ("zero_shot",),
    ("answers",),
    ("conformance", "training", "search", "evaluation", "bench"),
    ("exploring", "serve", "web"),
    ("commands",),
    ("__main__",),
)
DOORS = {("miniclip.kernels.check", "miniclip.bench.kernel_check")}  # python -m miniclip.kernels.check
KERNELS_IMPORT = {"torch", "triton", "numpy"}  # beside Python's own; numpy is what Triton's interpreter computes with

Sources = dict[str, str]  # text by module


def sources() -> Sources:
    found = {}
    for folder, package in (("miniclip", "miniclip"), ("kernels", "miniclip.kernels"), ("weights", "miniclip.weights")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


@functools.cache
def imports(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(text: str, modules: set[str]) -> set[str]:
    """What a file imports: modules of the project by their full names, of all others the package."""
    found = set()
    for node in imports(text):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not node.level, "an import relative to its file"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
            if node.module == "miniclip":  # the names of its face stand for modules on many floors
                names = [f"miniclip.{alias.name}" for alias in node.names]
        found |= {name if name.split(".")[0] == "miniclip" else name.split(".")[0] for name in names}
    return found


def arrows(files: Sources) -> set[tuple[str, str]]:
    """(importer, imported) for all modules of the project, without the doors."""
    pairs = {(name, other) for name, text in files.items() for other in imported(text, set(files))}
    return {(name, other) for name, other in pairs if other.startswith("miniclip.")} - DOORS


def room(module: str) -> str:
    return module.split(".")[1]


def faults(files: Sources) -> list[str]:
    """Every arrow that does not go down from floor to floor."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{name} imports {other}"
        for name, other in arrows(files)
        if name != "miniclip" and room(name) != room(other) and floor[room(name)] <= floor.get(room(other), len(FLOORS))
    ]
    return sorted(upward)


def circle(pairs: set[tuple[str, str]]) -> list[str]:
    graph = defaultdict(set)
    for name, other in pairs:
        if name != other:
            graph[name].add(other)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_every_import_goes_down():
    assert {room(name) for name in sources() if name != "miniclip"} == {name for names in FLOORS for name in names}
    assert faults(sources()) == []


def test_no_circle_between_files():
    """Between folders there is none either: from one to another, every arrow goes down."""
    pairs = arrows(sources())
    assert len(pairs) > 300
    assert circle(pairs) == []


def test_the_face_imports_nothing_when_it_is_imported():
    for_people = sources()["miniclip"]
    for_checkers = for_people.index("if TYPE_CHECKING:")
    left = for_people[:for_checkers] + for_people[for_people.index("\n\n", for_checkers) :]
    found = imported(left, set(sources())) - {"miniclip.version"}
    assert {name.split(".")[0] for name in found} == {"importlib", "pathlib", "sys", "typing"}


def test_kernels_import_only_torch_and_triton():
    for name, text in sources().items():
        if name.startswith("miniclip.kernels"):
            others = {other for other in imported(text, set(sources())) if not other.startswith("miniclip")}
            assert others - sys.stdlib_module_names <= KERNELS_IMPORT, name


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("miniclip.config", "import miniclip.loading", "miniclip.config imports miniclip.loading"),
        (
            "miniclip.models.vit",
            "def f():\n    from miniclip.fast import clip",
            "miniclip.models.vit imports miniclip.fast.clip",
        ),
        ("miniclip.training.loop", "from miniclip.evaluation import tables", "imports miniclip.evaluation.tables"),
        ("miniclip.weights.names", "from miniclip import load", "miniclip.weights.names imports miniclip.load"),
        (
            "miniclip.kernels.tiles",
            "from miniclip.bench.kernel_check import main",
            "imports miniclip.bench.kernel_check",
        ),
    ],
)
def test_an_arrow_up_is_noticed(name, line, fault):
    files = sources()
    files[name] += f"\n{line}\n"
    assert any(fault in each for each in faults(files))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("miniclip.weights.errors", "import miniclip.weights.files"),
        ("miniclip.mobileclip.config", "def f():\n    from miniclip.mobileclip.names import read"),
    ],
)
def test_a_circle_is_noticed(name, line):
    files = sources()
    files[name] += f"\n{line}\n"
    assert circle(arrows(files)) != []
