"""What settles how bulk samples are read, where their file leaves it open."""

from dataclasses import dataclass
from typing import Literal

from runtime.script import check_settings


@dataclass
class BulkOptions:
    """Settings of the bulk reader; a script that has them as flags derives its own from these."""

    genes_in: Literal["auto", "rows", "columns"] = "auto"
    """Where the genes of --bulk are."""
    gene_column: str | None = None
    """Column of --bulk that names the genes. Default: the one with most genes of the model."""
    columns: tuple[str, ...] = ()
    """Columns of --bulk that are samples. Default: those of numbers that are not known to be
    annotation, statistics or other units."""
    bulk_unit: Literal["auto", "counts", "tpm", "cpm", "fpkm"] = "auto"
    """What is read where --bulk has several values of a sample. auto: counts if there are any."""
    log: Literal["auto", "no", "2", "e", "10"] = "auto"
    """Base of the logarithm that --bulk is on, which is undone. auto: a table on a logarithmic
    scale is refused; no: values are taken as they are."""
    pseudocount: float = 1.0
    """What was added before the logarithm of --log."""

    def __post_init__(self):
        check_settings(self)
