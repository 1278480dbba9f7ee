"""Progress of what takes more than a moment: a bar on stderr, nothing for small inputs."""

from tqdm import tqdm

DELAY = 2  # seconds before a bar is shown


def progress(steps, what, unit, total=None):
    """Iterate over steps, with a bar of what is being done if they take over DELAY seconds.

    steps: with a length, or total. what, unit: words of the bar.
    """
    return tqdm(steps, desc=what, unit=f" {unit}", total=total, delay=DELAY)
