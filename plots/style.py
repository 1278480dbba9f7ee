"""What all pictures share: colours, names, and saving as .png, .pdf or .svg."""

from pathlib import Path

import numpy as np

from runtime.writing import write_whole

# The seven colours of Okabe and Ito, then 33 more, chosen greedily. Each is the furthest (in Oklab)
# from white and from all before it, to full colour vision and, at a lower weight, to protanopia and
# deuteranopia (simulated after Machado et al., IEEE TVCG 2009). No near-black: small dots look
# alike.
TYPE_COLORS = [
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#5A0069"),
    *("#4B3C00", "#5A00FF", "#00FFB4", "#B4005A", "#000FA5", "#B45AFF", "#D20FC3", "#FF4B69"),
    *("#5A4B87", "#96C396", "#4BF0FF", "#005A4B", "#875A1E", "#9687E1", "#F0B4D2", "#5A1E2D"),
    *("#7800C3", "#00D25A", "#965A87", "#96E178", "#695AE1", "#B4C3FF", "#D20000", "#1E3C87"),
    *("#87874B", "#C39696", "#F087E1", "#871E2D", "#1E0FE1", "#4B5A69", "#5A78D2", "#7896C3"),
]
# Real and generated cells; under two conditions, real A and B, then generated A and B.
ORIGIN_COLORS = {2: ("#0072B2", "#D55E00"), 4: ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")}
DPI = 200  # of a .png
VECTOR_DPI = 300  # of the scatter layers inside a .pdf or .svg
FEW_POINTS = 500  # in a layer that stays vector
VECTOR = (".pdf", ".svg")
# Text stays text, and the same picture is the same file.
STYLE = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "bulk2sc"}
NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def pyplot():
    """matplotlib.pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_whole_figure(path, figure, dpi=DPI, **options):
    """Save a matplotlib figure whole or not at all, and close it.

    Args:
        path: ending in .png, .pdf or .svg, which says the format. dpi: of a .png; in the other
            formats, of their scatter layers, it is VECTOR_DPI. options: of ``savefig``.
    """
    suffix = Path(path).suffix.lower()
    dpi = VECTOR_DPI if suffix in VECTOR else dpi
    options = {"metadata": NO_DATE.get(suffix), "facecolor": "white"} | options
    plt = pyplot()
    try:
        with plt.rc_context(STYLE):
            write_whole(path, lambda part: figure.savefig(part, dpi=dpi, **options))
    finally:
        plt.close(figure)


def rasterized(n_points):
    """Whether a layer of so many points is an image inside a .pdf or .svg."""
    return n_points > FEW_POINTS


def type_colors(cell_types):
    """Colour of each cell type, the same in every picture of one model.

    cell_types: all names of the model in its order (K). Beyond 40 types colours repeat.

    Returns:
        dict: name -> "#RRGGBB".
    """
    return {name: TYPE_COLORS[k % len(TYPE_COLORS)] for k, name in enumerate(cell_types)}


def plain_text(name, longest=40):
    """A name as matplotlib shows it letter by letter, cut if it is very long."""
    name = str(name)
    name = name if len(name) <= longest else name[: longest - 1] + "…"
    return name.replace("$", r"\$")  # matplotlib sets what stands between two $ as a formula


def legend_of(figure, cell_types, **where):
    """A legend of cell types (K), in the colours that they have everywhere."""
    plt = pyplot()
    colors = type_colors(cell_types)
    dots = [plt.Line2D([], [], marker="o", ls="", ms=8, color=c) for c in colors.values()]
    names = [plain_text(name) for name in colors]
    options = {"frameon": False, "fontsize": 11, "handletextpad": 0.2}
    options |= {"ncols": legend_columns(cell_types)}
    figure.legend(dots, names, **options, **where)


def legend_columns(cell_types):
    """Columns of :func:`legend_of`: a panel's height has room for 20 names."""
    return int(np.ceil(len(cell_types) / 20)) or 1


def legend_width(cell_types):
    """Inches that :func:`legend_of` takes."""
    width = 0.6 + 0.095 * max(len(plain_text(name)) for name in cell_types)
    return width * legend_columns(cell_types)


def draw_identity(axis, end):
    """Draw the line x = y, with both axes from 0 to end."""
    axis.axline((0, 0), slope=1, color="0.6", lw=1, ls="--", zorder=0)
    axis.set_xlim(-0.02 * end, 1.03 * end)
    axis.set_ylim(-0.02 * end, 1.03 * end)
    axis.set_box_aspect(1)
    axis.spines[["top", "right"]].set_visible(False)
