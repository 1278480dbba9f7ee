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

from data import RunSettings
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
class Settings(RunSettings):
    """Train all three stages on a labelled reference.

    Example: python train.py --data filtered_feature_bc_matrix --labels celltypes.csv
    """

    epochs: tuple[int, int, int] | None = None
    """Epochs of scGMVAE and of scDecoder, and steps of the Bulk Encoder. Default: by the number of
    cells, and 300 steps."""


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
