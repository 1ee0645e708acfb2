"""Rules on imports, which keep the layout of the repository. A made-up tree that breaks a rule tests each rule."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('soft_mm', 'benchmarks', 'projects', 'tools')
# "Unix-specific services" of Python's library reference, and the modules that Windows builds lack.
UNIX_ONLY = {
    *('crypt', 'curses', 'fcntl', 'grp', 'nis', 'posix', 'pty', 'pwd', 'readline', 'resource', 'spwd', 'syslog'),
    *('termios', 'tty'),
}


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        source: name of the importing module.
        target: name of the imported module.
        line: line number in the importing file.
        in_function: whether the import runs only when a function is called.
    """

    source: str
    target: str
    line: int
    in_function: bool

    def __str__(self):
        return f'{self.source} line {self.line}: {self.target}'


# --- reading


def python_files(root, folder):
    """Return the modules of a folder, without config files and without the links of an editable installation."""
    files = sorted((root / folder).rglob('*.py'))
    left_out = {'configs', '.mim', '__pycache__'}
    return [file for file in files if not left_out & set(file.relative_to(root).parts)]


def find_modules(root, folders=PACKAGES):
    """Return the file of each module by its dotted name."""
    modules = {}
    for folder in folders:
        for file in python_files(root, folder):
            parts = file.relative_to(root).with_suffix('').parts
            modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = file
    return modules


def find_imports(modules):
    """Return all imports of the modules. ``from package import name`` imports the submodule if there is one."""
    return [found for name, file in modules.items() for found in _imports_of(name, file, modules)]


def _imports_of(name, file, modules):
    package = name if file.name == '__init__.py' else name.rpartition('.')[0]

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                above = package.split('.')[: len(package.split('.')) - node.level + 1]
                base = '.'.join([*above, *([base] if base else [])])
            for alias in node.names:
                submodule = f'{base}.{alias.name}'
                yield Import(name, submodule if submodule in modules else base, node.lineno, in_function)
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    yield from visit(ast.parse(file.read_text(encoding='utf-8')), False)


def below(name, *packages):
    """Return whether a module is one of the packages or lies in one."""
    return any(name == package or name.startswith(f'{package}.') for package in packages)


# --- rules: each returns the violations


def circle(modules, imports):
    """Return the modules of one import circle. Imports in functions count inside the package only."""
    graph = defaultdict(set)
    for found in imports:
        counts = not found.in_function or below(found.source, 'soft_mm')
        # Importing a.b.c runs a/__init__.py and a/b/__init__.py first, except those that are already being imported.
        parts = found.target.split('.')
        targets = {'.'.join(parts[:length]) for length in range(1, len(parts) + 1)}
        targets = {target for target in targets if target == found.target or not below(found.source, target)}
        if counts:
            graph[found.source] |= targets & set(modules)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def foreign_to_ops(imports):
    """Return the imports of soft_mm.ops other than torch, the standard library and soft_mm.ops itself."""
    allowed = ('soft_mm.ops', 'torch', *sys.stdlib_module_names)
    return [found for found in imports if below(found.source, 'soft_mm.ops') and not below(found.target, *allowed)]


def upward(imports):
    """Return the imports of benchmarks, projects or tools in the package, and of projects in benchmarks."""
    rules = {'soft_mm': ('benchmarks', 'projects', 'tools'), 'benchmarks': ('projects',)}
    return [
        found
        for source, targets in rules.items()
        for found in imports
        if below(found.source, source) and below(found.target, *targets)
    ]


def unix_only(imports):
    """Return the imports of Unix-only modules in the package and in tools, which must run on Windows."""
    return [found for found in imports if below(found.source, 'soft_mm', 'tools') and below(found.target, *UNIX_ONLY)]


def shared_names(root, folders=(*PACKAGES, '.dev_scripts')):
    """Return the files that have the base name of another file. ``__init__`` and ``__main__`` may repeat."""
    by_name = defaultdict(list)
    for folder in folders:
        for file in python_files(root, folder):
            # pytest itself refuses two test files of one name.
            if file.stem not in ('__init__', '__main__') and 'tests' not in file.relative_to(root).parts:
                by_name[file.stem].append(file.relative_to(root).as_posix())
    return sorted(files for files in by_name.values() if len(files) > 1)


def texts(imports):
    return [str(found) for found in imports]


# --- the repository


@pytest.fixture(scope='module')
def modules():
    return find_modules(ROOT)


@pytest.fixture(scope='module')
def imports(modules):
    return find_imports(modules)


def test_every_package_is_read(modules, imports):
    for package in PACKAGES:
        assert any(below(name, package) for name in modules), package
    assert any(found.in_function for found in imports) and len(imports) > len(modules)


def test_no_circle(modules, imports):
    assert circle(modules, imports) == []


def test_ops_imports_torch_only(imports):
    assert texts(foreign_to_ops(imports)) == []


def test_imports_point_one_way(imports):
    assert texts(upward(imports)) == []


def test_package_and_tools_import_no_unix_only_module(imports):
    assert texts(unix_only(imports)) == []


def test_base_names_are_unique():
    assert shared_names(ROOT) == []


def test_tools_can_be_imported_without_unix_only_modules(environment):
    """As on Windows, where for example tools/predict.py must start."""
    tools = [str(file) for file in (ROOT / 'tools').glob('*.py')]
    assert any(tool.endswith('predict.py') for tool in tools)
    code = f"""
import runpy, sys
for name in ('resource', 'fcntl', 'termios'):
    sys.modules[name] = None
for tool in {tools}:
    runpy.run_path(tool, run_name='imported')
"""
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# --- the rules on made-up trees

CLEAN = {
    'soft_mm/__init__.py': 'from .models import SOFT\n',
    'soft_mm/registry.py': 'import mmengine\n',
    'soft_mm/ops/__init__.py': 'from .kernel import gaussian\n',
    'soft_mm/ops/kernel.py': 'import math\nimport torch.nn.functional as F\nfrom soft_mm.ops import checks\n',
    'soft_mm/ops/checks.py': '',
    'soft_mm/models/__init__.py': 'from .soft import SOFT\n',
    'soft_mm/models/soft.py': 'from soft_mm import ops, registry\ndef f():\n    import mmdet\n',
    'benchmarks/__init__.py': '',
    'benchmarks/__main__.py': 'import soft_mm\nfrom . import worker\n',
    'benchmarks/worker.py': 'import resource\n',
    'projects/__init__.py': '',
    'projects/digits/__init__.py': 'import benchmarks.worker\n',
    'projects/digits/configs/soft.py': 'import soft_mm\n',
    'projects/digits/tests/test_soft.py': 'from projects import digits\n',
    'tools/train.py': 'import soft_mm.models\n',
    '.dev_scripts/model_zoo.py': 'import fcntl\n',
}


@pytest.fixture
def tree(tmp_path):
    """A function that writes the clean tree with changes and returns its root, modules and imports."""

    def write(changes=None):
        for path, text in {**CLEAN, **(changes or {})}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        modules = find_modules(tmp_path)
        return tmp_path, modules, find_imports(modules)

    return write


def test_clean_tree_breaks_no_rule(tree):
    root, modules, imports = tree()
    assert set(modules) == {
        *('soft_mm', 'soft_mm.registry', 'soft_mm.ops', 'soft_mm.ops.kernel', 'soft_mm.ops.checks', 'soft_mm.models'),
        *('soft_mm.models.soft', 'benchmarks', 'benchmarks.__main__', 'benchmarks.worker', 'projects'),
        *('projects.digits', 'projects.digits.tests.test_soft', 'tools.train'),
    }
    assert circle(modules, imports) == foreign_to_ops(imports) == upward(imports) == unix_only(imports) == []
    assert shared_names(root) == []


@pytest.mark.parametrize(
    ('text', 'target'),
    [
        ('import a', 'a'),
        ('import soft_mm.ops.kernel as k', 'soft_mm.ops.kernel'),
        ('from .soft import SOFT', 'soft_mm.models.soft'),
        ('from . import soft', 'soft_mm.models.soft'),
        ('from . import SOFT', 'soft_mm.models'),
        ('from ..ops import kernel', 'soft_mm.ops.kernel'),
        ('from ..ops import gaussian', 'soft_mm.ops'),
        ('from soft_mm import ops', 'soft_mm.ops'),
        ('from soft_mm import SOFT', 'soft_mm'),
        ('try:\n    import a\nexcept ImportError:\n    pass', 'a'),
        ('class A:\n    import a', 'a'),
    ],
)
def test_targets_are_resolved(tree, text, target):
    for indent, in_function in (('', False), ('    ', True)):
        body = '\n'.join(indent + line for line in text.splitlines())
        imports = tree({'soft_mm/models/new.py': 'def f():\n' * in_function + body + '\n'})[2]
        found = [(each.target, each.in_function) for each in imports if each.source == 'soft_mm.models.new']
        assert found == [(target, in_function)]


def test_relative_import_of_a_package_starts_in_it(tree):
    imports = tree()[2]
    assert [found.target for found in imports if found.source == 'soft_mm.models'] == ['soft_mm.models.soft']


@pytest.mark.parametrize(
    ('path', 'text', 'members'),
    [
        ('soft_mm/ops/checks.py', 'from .kernel import gaussian', {'soft_mm.ops.checks', 'soft_mm.ops.kernel'}),
        ('soft_mm/ops/checks.py', 'def f():\n    from . import kernel', {'soft_mm.ops.checks', 'soft_mm.ops.kernel'}),
        ('soft_mm/models/soft.py', 'from soft_mm import SOFT', {'soft_mm', 'soft_mm.models', 'soft_mm.models.soft'}),
        ('benchmarks/worker.py', 'import benchmarks.__main__', {'benchmarks.worker', 'benchmarks.__main__'}),
    ],
)
def test_circle_is_found(tree, path, text, members):
    _, modules, imports = tree({path: text})
    assert set(circle(modules, imports)) == members


def test_circle_through_the_init_of_another_package_is_found(tree):
    """Importing ``checkpoints.reading`` runs ``checkpoints/__init__.py``, which imports the models again."""
    changes = {
        'soft_mm/checkpoints/__init__.py': 'from .convert import convert',
        'soft_mm/checkpoints/convert.py': 'from soft_mm.models import SOFT',
        'soft_mm/checkpoints/reading.py': '',
        'soft_mm/models/soft.py': 'from soft_mm.checkpoints.reading import read',
    }
    members = {'soft_mm.checkpoints', 'soft_mm.checkpoints.convert', 'soft_mm.models', 'soft_mm.models.soft'}
    _, modules, imports = tree(changes)
    assert set(circle(modules, imports)) == members


def test_import_in_a_function_outside_the_package_breaks_a_circle(tree):
    _, modules, imports = tree({'benchmarks/worker.py': 'def f():\n    import benchmarks.__main__'})
    assert circle(modules, imports) == []


@pytest.mark.parametrize(
    'text', ['import numpy', 'from mmengine import Config', 'import soft_mm', 'from .. import models']
)
@pytest.mark.parametrize('function', ['', 'def f(): '])
def test_foreign_import_of_ops_is_found(tree, text, function):
    (found,) = foreign_to_ops(tree({'soft_mm/ops/checks.py': function + text})[2])
    assert found.source == 'soft_mm.ops.checks'


@pytest.mark.parametrize(
    ('path', 'text'),
    [
        ('soft_mm/registry.py', 'import benchmarks'),
        ('soft_mm/registry.py', 'def f(): from projects.digits import x'),
        ('soft_mm/models/soft.py', 'from tools import train'),
        ('benchmarks/worker.py', 'from projects import digits'),
    ],
)
def test_upward_import_is_found(tree, path, text):
    (found,) = upward(tree({path: text})[2])
    assert found.line == 1


@pytest.mark.parametrize('path', ['soft_mm/registry.py', 'tools/train.py'])
@pytest.mark.parametrize('text', ['import resource', 'from fcntl import flock', 'def f(): import termios'])
def test_unix_only_import_is_found(tree, path, text):
    assert len(unix_only(tree({path: text})[2])) == 1


@pytest.mark.parametrize('path', ['tools/registry.py', '.dev_scripts/registry.py', 'projects/digits/registry.py'])
def test_shared_name_is_found(tree, path):
    assert shared_names(tree({path: ''})[0]) == [['soft_mm/registry.py', path]]
