"""The rooms of the package: modules stay small, and imports form no cycle."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from transformers import Trainer

import lpg_hf


PACKAGE = Path(lpg_hf.__file__).parent
MAX_LINES = 350


def module_names(root: Path) -> dict[str, Path]:
    """The modules of a package by their full name; a package goes by the name of its folder."""
    names = {}
    for path in root.rglob("*.py"):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str | None]]:
    """Each import as module and name; imports inside functions and under `if TYPE_CHECKING` count as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package itself, every further dot the one above.
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            target = node.args[0]
            assert isinstance(target, ast.Constant), f"cannot read the module in `{ast.unparse(node)}`"
            yield (package + target.value if target.value.startswith(".") else target.value), None


def import_graph(root: Path) -> dict[str, set[str]]:
    """For each module the modules of the same package that it imports."""
    modules = module_names(root)
    graph = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        # `from package import name` imports the submodule where there is one, else the package's own `__init__`.
        targets = {
            f"{target}.{name}" if f"{target}.{name}" in modules else target
            for target, name in imports(ast.parse(path.read_text(encoding="utf-8")), package)
        }
        graph[module] = targets & set(modules)
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_import_cycle():
    graph = import_graph(PACKAGE)
    assert graph["lpg_hf"] and "lpg_hf.batch" in graph["lpg_hf.loss"]
    assert find_cycle(graph) is None


@pytest.mark.parametrize(
    "line",
    [
        "from .deep import inner",
        "from . import deep",
        "import room.deep",
        "from room.deep.inner import value",
        "def later():\n    from .deep.inner import value",
        "if TYPE_CHECKING:\n    from .deep.inner import Value",
        "def later():\n    return import_module('.deep.inner', __package__)",
    ],
)
def test_every_kind_of_import_is_seen(line, tmp_path):
    (tmp_path / "room" / "deep").mkdir(parents=True)
    (tmp_path / "room" / "__init__.py").write_text("")
    (tmp_path / "room" / "deep" / "__init__.py").write_text("from .inner import value")
    (tmp_path / "room" / "deep" / "inner.py").write_text("from ..top import other")
    (tmp_path / "room" / "top.py").write_text("")
    assert find_cycle(import_graph(tmp_path / "room")) is None
    (tmp_path / "room" / "top.py").write_text(line)
    cycle = find_cycle(import_graph(tmp_path / "room"))
    assert {"room.top", "room.deep.inner"} <= set(cycle)


def test_the_report_is_not_needed_for_a_summary():
    graph = import_graph(PACKAGE)
    reached, waiting = set(), ["lpg_hf.summary", "lpg_hf.model_card"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += graph[module] - reached
    assert not [module for module in reached if module.startswith(("lpg_hf.report", "lpg_hf.trainer"))]


def test_the_trainer_knows_reports_by_a_late_import_alone_and_no_certificates():
    graph = library_graph()
    importers = {module for module in graph if "lpg_hf.report" in graph[module]}
    assert importers == {"lpg_hf.trainer.reports"}
    tree = ast.parse((PACKAGE / "trainer" / "reports.py").read_text(encoding="utf-8"))
    assert "report" not in [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    for module, targets in graph.items():
        if module.startswith("lpg_hf.trainer"):
            assert not [target for target in targets if target.startswith("lpg_hf.pac_bayes")]
        elif module != "lpg_hf":
            assert not [target for target in targets if target.startswith("lpg_hf.trainer")]


def library_graph() -> dict[str, set[str]]:
    """Without the command line, which stands on top of all of it as a script of a user does."""
    return {module: targets for module, targets in import_graph(PACKAGE).items() if not is_command(module)}


def is_command(module: str) -> bool:
    return module.startswith("lpg_hf.commands")


def test_nothing_imports_the_command_line():
    assert not [module for module, targets in library_graph().items() if any(map(is_command, targets))]
    assert any(map(is_command, import_graph(PACKAGE)))


def test_the_trainer_is_thin():
    def own_classes(file: str) -> dict[str, ast.ClassDef]:
        tree = ast.parse((PACKAGE / "trainer" / file).read_text(encoding="utf-8"))
        return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    trainer = own_classes("lpg_trainer.py")["LPGTrainer"]
    parts = [
        trainer,
        own_classes("label_issues.py")["LabelIssuesMixin"],
        own_classes("sam_step.py")["SAMStepMixin"],
        own_classes("reports.py")["ReportsMixin"],
        own_classes("class_shift.py")["ClassShiftMixin"],
        own_classes("checkpoint_mixin.py")["CheckpointMixin"],
        own_classes("resumable.py")["ResumableTrainer"],
    ]
    assert {base.id for base in trainer.bases} == {part.name for part in parts[1:]}
    assigned = {
        node.attr
        for part in parts
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    own = assigned - {"data_collator"}  # the Trainer's
    assert "_lpg_classifier" in own and len(own) <= 12
    parts.append(own_classes("step_watch.py")["StepWatchMixin"])  # the base of two of them
    # Subclasses of users have attributes and methods of their own.
    methods = {node.name for part in parts for node in part.body if isinstance(node, ast.FunctionDef)}
    new = {name for name in own | methods if not hasattr(Trainer, name)}
    assert {name for name in new if not name.startswith("_lpg_")} == {
        "lpg_loss",
        "label_issues",
        "report",
        "shift_class_shares",
    }
    overrides = [
        [node.name for node in part.body if isinstance(node, ast.FunctionDef) and hasattr(Trainer, node.name)]
        for part in parts
    ]
    assert max(map(len, overrides)) <= 12
    assert trainer.end_lineno - trainer.lineno < MAX_LINES


def test_no_module_is_long():
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    too_long = {name for name, length in lengths.items() if length > MAX_LINES}
    # Equal: a module that was split leaves the set.
    assert not too_long


def test_no_text_depends_on_the_locale():
    """Without an encoding, Python reads and writes in that of the machine, which may not have the characters."""
    calls = [
        (path.name, node.lineno, node.func.attr)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_text(node)
        if not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert not calls


def is_text(call: ast.Call) -> bool:
    """Whether it opens a file as text, by the methods of `Path`."""
    if call.func.attr in ("read_text", "write_text"):
        return True
    mode = call.args[0] if call.func.attr == "open" and call.args else None
    return isinstance(mode, ast.Constant) and re.fullmatch(r"[rwax]\+?", mode.value) is not None
