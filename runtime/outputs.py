"""The files of a run of bulk2sc.py: their names, and whether what is there may be replaced."""

import contextlib
import os
from pathlib import Path

from runtime.cell_writers import FOLDER_FILES, kind_of
from runtime.errors import InputError
from runtime.writing import check_writable, first_line, has_entries

# Beside the cells, by what was asked for.
OF_SAMPLES = ("proportions.csv",)
OF_BULKS = ("fit.csv", "expression.h5ad")
OF_10X = ("cells.csv",)

# What tells that a file is from bulk2sc: entries of an .h5ad, beginnings of a first line.
OWN_ENTRIES = {
    "h5ad": ["uns/settings", "uns/cell_types", "uns/proportions"],
    "expression.h5ad": [
        *("obs/sample", "obs/cell_type", "obs/proportion"),
        *("layers/log2_fold_change", "layers/log2_fold_change_sd"),
    ],
}
OWN_LINES = {
    "proportions.csv": "sample,cell_type,proportion,low,high,rna_fraction",
    "fit.csv": "sample,correlation,unexplained,misfit,unknown,unknown_low,unknown_high",
    "cells.csv": "cell,sample,cell_type,",
    "evaluation.csv": "metric,best,cell_type,method,mean,std,n",
    "report.html": "<!doctype html><!-- bulk2sc",
}


class Outputs:
    """The files of one run.

    Attributes:
        path: --out, a file or a folder. kind: ``h5ad``, ``h5`` or ``folder``. cells: the files of
            the cells themselves. beside: what stands beside them, for example ``fit.csv``. picture:
            which of these is the picture of proportions.
    """

    def __init__(
        self, path, of_samples=False, of_bulks=False, picture="png", report=True, cells=True
    ):
        """Args:
        path: --out. of_samples, of_bulks: whether there are samples, and bulks of them. picture:
            the format of pictures. report: whether there is one of bulks. cells: whether there are.

        Raises:
            InputError: the path ends in something else.
        """
        self.path, self.kind = Path(path), kind_of(path)
        if self.kind is None:
            raise InputError(
                f"--out {path}: expected a name that ends in .h5ad or .h5 (10x), or one without an "
                "ending for a 10x folder"
            )
        of_cells = OF_10X * (cells and self.kind != "h5ad")
        of_samples = (*OF_SAMPLES, f"proportions.{picture}") * of_samples
        page = ("report.html",) * (of_bulks and report)
        self.beside = [*of_samples, *page, *OF_BULKS * of_bulks, *of_cells]
        self.picture = f"proportions.{picture}"
        self.cells = [self.path] * cells
        if self.kind == "folder":
            self.cells = [self.path / name for name in FOLDER_FILES * cells]

    def __getitem__(self, name):
        """The path of a file beside the cells: ``x.fit.csv``, or ``fit.csv`` in a folder."""
        if self.kind == "folder":
            return self.path / name
        return self.path.with_name(f"{self.path.stem}.{name}")

    def all(self):
        """Every file of the run: dict from path to what it is."""
        return dict.fromkeys(self.cells, self.kind) | {self[name]: name for name in self.beside}

    def check_inputs(self, given):
        """Refuse to write over an input; a link to it would be replaced, too.

        Args:
            given: paths of inputs.

        Raises:
            InputError: a file of the run is one of them.
        """
        for path in self.all():
            for source in given:
                with contextlib.suppress(OSError):  # one of them is not there
                    if os.path.samestat(path.lstat(), source.stat()):
                        raise InputError(
                            f"--out {self.path}: would write {path} over the input {source}, "
                            "expected another name"
                        )

    def check_replaced(self, force):
        """Check that every file that this run would replace is from bulk2sc; force: any may be.

        Raises:
            InputError: one is not, a folder is in the way, or nothing can be written there.
        """
        if self.kind == "folder" and self.path.exists() and not self.path.is_dir():
            raise InputError(
                f"{self.path}: found a file, expected a folder or nothing of this name"
            )
        check_writable(self["proportions.csv"].parent)
        # Then what is beside them is ours as well; a picture cannot tell.
        cells = (self.path, "h5ad") if self.kind == "h5ad" else (self["cells.csv"], "cells.csv")
        of_own_cells = is_own(*cells)
        of_own_table = is_own(self["proportions.csv"], "proportions.csv")
        for path, what in self.all().items():
            if path.is_dir():
                raise InputError(f"{path}: found a folder, expected a file or nothing at this name")
            is_ours = of_own_cells or is_own(path, what) or (what == self.picture and of_own_table)
            if path.exists() and not (force or is_ours):
                raise InputError(
                    f"{path}: found a file that is not from bulk2sc, expected another --out, or "
                    "--force to replace it"
                )


def is_own(path, what):
    """Whether a file that is there is recognisably from bulk2sc; what: as in Outputs.all."""
    if not path.is_file():  # a pipe would never answer
        return False
    if what in OWN_ENTRIES:
        return has_entries(path, OWN_ENTRIES[what])
    return what in OWN_LINES and (first_line(path) or "").startswith(OWN_LINES[what])
