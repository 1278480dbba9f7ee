"""Look through an HDF5 file in a process of its own: a broken one can crash or hang the library.

    python readers/hdf5_probe.py cells.h5ad
    python readers/hdf5_probe.py cells.h5ad obs var          # of which these groups will be read

Prints how many bytes its datasets take in memory, or those of some groups, or a line that begins
with "refused:". Reads all attributes, all datasets that are small, and the ends of the others.
"""

import sys

import h5py

SMALL = 64e6  # bytes of a dataset that is read as a whole


def refuse(text):
    print(f"refused: {text!r}")
    sys.exit(0)


def look_through(path, within=()):
    """Return the bytes of all datasets; whatever h5py raises on a broken file goes through.

    within: the groups of which the bytes count, if there are such; default: all.
    """
    total, seen = 0, set()
    with h5py.File(path, "r") as file:
        parts = [file[name] for name in within if name in file]
        counted = None  # until all of them are done
        groups = [file, *parts]
        while groups:
            group = groups.pop()
            if within and group == file:
                counted = total
            dict(group.attrs)
            for name in group:
                if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                    refuse(f"{name} is a link to another file")
                item = group[name]
                key = h5py.h5o.get_info(item.id).addr
                if key in seen:  # links may go round in circles
                    continue
                seen.add(key)
                dict(item.attrs)
                if isinstance(item, h5py.Group):
                    groups.append(item)
                elif isinstance(item, h5py.Dataset):
                    if item.is_virtual or item.external:
                        refuse(f"{name} keeps its values in another file")
                    # A string is held as an object of some 50 bytes.
                    width = item.dtype.itemsize + (50 if item.dtype.hasobject else 0)
                    size = int(item.size or 0) * width
                    total += size
                    if size <= SMALL:
                        item[()]
                    elif size / item.shape[0] <= SMALL:
                        item[:1], item[-1:]
    return total if counted is None else counted


if __name__ == "__main__":
    print(look_through(sys.argv[1], sys.argv[2:]))
