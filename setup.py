"""Builds the package bulk2sc from the scripts, which import each other as modules of one folder.

In the package they are modules of bulk2sc, so that no `data` or `models` stands at the top of
site-packages. Everything else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDERS = [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "package"]
NOT_PACKED = {"setup"}
# What generation needs of the shipped weights; the trainings make the other files.
DATA = (
    *("tables/*.csv", "plots/*.html", "weights/*Encoder_model.pt", "weights/scDecoder_model.pt"),
    *("weights/pbmc/*Encoder_model.pt", "weights/pbmc/scDecoder_model.pt"),
)


def modules():
    """Path in the package -> source, of every module."""
    scripts = {path.name: path for path in ROOT.glob("*.py") if path.stem not in NOT_PACKED}
    for folder in FOLDERS:
        scripts |= {f"{folder}/{path.name}": path for path in (ROOT / folder).glob("*.py")}
    return scripts


def as_package(source, names):
    """The source of a module in which imports of ``names`` are imports from bulk2sc."""
    known = "|".join(sorted(names))
    source = re.sub(rf"^(\s*)from ({known})(?=[. ])", r"\1from bulk2sc.\2", source, flags=re.M)
    source = re.sub(rf"^(\s*)import ({known})\b", r"\1from bulk2sc import \2", source, flags=re.M)
    # The folder of the scripts is not to be searched for modules.
    return re.sub(r"^sys\.path\.insert\(0, .*\n", "", source, flags=re.M)


class BuildPackage(build_py):
    """Puts the modules and the data beside package/__init__.py."""

    def files(self):
        """Path in the package -> source, of modules and data."""
        data = {str(p.relative_to(ROOT)): p for pattern in DATA for p in ROOT.glob(pattern)}
        return modules() | data

    def run(self):
        super().run()
        names = {path.removesuffix(".py").split("/")[0] for path in modules()}
        for path, source in self.files().items():
            target = Path(self.build_lib) / "bulk2sc" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".py":
                text = as_package(source.read_text(encoding="utf-8"), names)
                target.write_text(text, encoding="utf-8")
            else:
                target.write_bytes(source.read_bytes())

    def get_outputs(self, include_bytecode=1):
        own = [str(Path(self.build_lib) / "bulk2sc" / path) for path in self.files()]
        return super().get_outputs(include_bytecode) + own


def requirements():
    """The requirements of requirements.txt, without comments and options of pip."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("#")[0].strip() for line in lines]
    return [name for name in names if name and not name.startswith("-")]


setup(install_requires=requirements(), cmdclass={"build_py": BuildPackage})
