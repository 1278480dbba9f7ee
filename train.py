"""All three trainings, one after the other in one process.

    python train.py --data filtered_feature_bc_matrix --labels celltypes.csv --weights my_weights

The same as train_gmvae.py, train_decoder.py and train_encoder.py with these flags, without starting
Python three times. Each of the scripts has more settings of its own; --resume goes on with the
stage that was interrupted.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import DatasetSettings
from runtime.flags import in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples donors conditions baseline batch_key",
        "output": "weights",
        "training": "held_out held_out_donors epochs resume",
    }
)
@dataclass
class Settings(DatasetSettings):
    """Train all three stages on a labelled reference.

    Example: python train.py --data filtered_feature_bc_matrix --labels celltypes.csv
    """

    held_out: float | None = None
    """Fraction of the cells of each type kept out of all training; with --samples, fraction of the
    donors. Default: 0.2."""
    donors: str | None = None
    """Donor of each cell, given as --samples is: samples of one donor are held out together.
    Default: each sample is a donor of its own."""
    held_out_donors: tuple[str, ...] = ()
    """Donors kept out of all training, by name, in place of a fraction of them."""
    conditions: str | None = None
    """Condition of each cell (treatment, disease), given as --samples is. What samples of the other
    conditions differ from the baseline by is what bulks can have of their state."""
    baseline: tuple[str, ...] = ()
    """Conditions that a bulk reads as which shows nothing else, such as control; the second is for
    batches without the first, and so on. Default: the most common one."""
    batch_key: str | None = None
    """Dataset or protocol of each cell, given as --samples is. What batches differ by at their
    baselines is no state, and the Bulk Encoder learns from it how platforms differ."""
    epochs: tuple[int, int, int] | None = None
    """Epochs of scGMVAE and of scDecoder, and steps of the Bulk Encoder. Default: by the number of
    cells, and 300 steps."""
    resume: bool = False
    """Go on where an interrupted run was; stages that have ended are left as they are."""
    backed: bool = False
    """Leave the counts in the .h5ad and read them block by block, for references larger than
    memory."""
    checkpoint_every: float = 60
    """Seconds between checkpoints; a run that is killed loses no more training than this."""


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from api import train
from runtime.processes import distributed


@distributed
def main(cfg):
    given = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    train(given.pop("data"), **given)


if __name__ == "__main__":
    run_script(main, settings)
