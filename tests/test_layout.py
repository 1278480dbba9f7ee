"""Which folder may import which, and that --help answers before the slow imports."""

import ast
import os
import subprocess
import sys

from conftest import FOLDERS, ROOT

SCRIPTS = [
    *("annotate", "bulk2sc", "evaluate", "make_figures", "simulate_bulks"),
    *("train", "train_gmvae", "train_decoder", "train_encoder"),
]
# Folders of the plumbing -> those that they may import from; the others may import all.
ALLOWED = {"readers": {"readers", "runtime"}, "runtime": {"runtime"}}


def module_names():
    """Dotted name -> path of every module of the project."""
    paths = [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in ROOT.glob(f"{name}/*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def imports_of(path):
    """``(module, names)`` of every import in a file; names is [] where a module is imported."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            imports.append((node.module, names))
    return imports


def project_imports(modules):
    """Module -> the modules of the project that it imports."""
    graph = {}
    for name, path in modules.items():
        graph[name] = set()
        for module, names in imports_of(path):
            candidates = [module, *(f"{module}.{n}" for n in names)]
            graph[name] |= {c for c in candidates if c in modules}
    return graph


def layer(name):
    return name.rpartition(".")[0]


def test_plumbing_never_imports_the_root():
    graph = project_imports(module_names())
    assert len(graph["bulk2sc"]) > 5 and graph["readers.counts"]  # imports are detected
    for name in (name for name in graph if layer(name) in ALLOWED):
        forbidden = {other for other in graph[name] if layer(other) not in ALLOWED[layer(name)]}
        assert not forbidden, f"{name} imports {forbidden}"


def test_no_import_goes_round_in_a_circle():
    graph = project_imports(module_names())
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_scripts_take_no_helper_from_a_script():
    """A script may import another as a module, to run its main."""
    for name, path in module_names().items():
        for module, names in imports_of(path):
            assert module not in SCRIPTS or not names, f"{name}: {names} from {module}"


def test_help_answers_before_the_slow_imports():
    """--help also shows an example and the choices of settings.

    PYTHONSAFEPATH keeps the script's folder out of the path. Regression: a traceback.
    """
    scripts = [*SCRIPTS, "benchmarks/benchmark", "benchmarks/blood_types", "examples/simulate_bulk"]
    code = (
        "import os, runpy, sys\n"
        "import tyro\n"
        "for script in sys.argv[1:]:\n"
        "    if os.fork():\n"
        "        assert not os.wait()[1], script\n"
        "        continue\n"
        "    sys.argv[:] = [f'{script}.py', '--help']\n"
        "    try:\n"
        "        runpy.run_path(f'{script}.py', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, end.code\n"
        "    slow = {'torch', 'scanpy', 'anndata', 'sklearn', 'matplotlib', 'numba'}\n"
        "    assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        "    break\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *scripts],
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for script in scripts:
        assert f"python {script}.py" in done.stdout
    assert "{nb,zinb,mse_l1}" in done.stdout and "{auto,posterior,prior}" in done.stdout
