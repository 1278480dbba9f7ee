"""Read an HDF5 file in a separate process, as a broken one can crash or hang the library.

    python readers/hdf5_probe.py cells.h5ad
    python readers/hdf5_probe.py cells.h5ad obs var          # only these groups count

Prints the size of the datasets in memory (bytes), or a line that begins with "refused:".
"""

import sys

import h5py

SMALL = 64e6  # bytes of a dataset, or of one of its rows, that is read


def refuse(text):
    """Print why the file is refused, and end the process."""
    print(f"refused: {text!r}")
    sys.exit(0)


def look_through(path, within=()):
    """Read all attributes, small datasets, and the first and last row of larger ones.

    Args:
        path: the file. within: names of groups; those that exist are counted.

    Returns:
        Bytes that the datasets of these groups take in memory; default: of the whole file.

    Raises:
        Exception: whatever h5py raises on a broken file.
    """
    with h5py.File(path, "r") as file:
        seen = set()
        counted = look_through_groups([file[name] for name in within if name in file], seen)
        total = counted + look_through_groups([file], seen)
    return counted if within else total


def look_through_groups(groups, seen):
    """Bytes of the datasets in some groups and below them.

    Args:
        groups: list of h5py groups. seen: addresses of objects that are counted already, as links
            may form circles; extended in place.
    """
    n_bytes = 0
    while groups:
        group = groups.pop()
        dict(group.attrs)
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                refuse(f"{name} is a link to another file")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            dict(item.attrs)
            if isinstance(item, h5py.Group):
                groups.append(item)
            elif isinstance(item, h5py.Dataset):
                n_bytes += look_through_dataset(item, name)
    return n_bytes


def look_through_dataset(dataset, name):
    """Bytes that a dataset takes in memory."""
    if dataset.is_virtual or dataset.external:
        refuse(f"{name} keeps its values in another file")
    # Each string becomes an object of about 50 bytes.
    width = dataset.dtype.itemsize + (50 if dataset.dtype.hasobject else 0)
    n_bytes = int(dataset.size or 0) * width
    if n_bytes <= SMALL:
        dataset[()]
    elif n_bytes / dataset.shape[0] <= SMALL:
        dataset[:1], dataset[-1:]
    return n_bytes


if __name__ == "__main__":
    print(look_through(sys.argv[1], sys.argv[2:]))
