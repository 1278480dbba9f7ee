"""The schematic of README: the three networks, and the data that flow between them."""

from plots.style import pyplot, write_whole_figure

DATA, NETWORK, LATENT = "#F2F2F2", "#CFE5F5", "#FBE3C4"  # colours of the boxes


def write_schematic(path):
    """Write the three networks and the data that flow between them, as README explains them."""
    figure, axis = pyplot().subplots(figsize=(10.4, 5.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set_xlim(0, 104)
    axis.set_ylim(0, 52)
    axis.axis("off")
    for y, label in ((49.4, "TRAINING, on a labelled single-cell reference"), (16.6, "GENERATION")):
        axis.text(2, y, label, fontsize=10.5, weight="bold", color="#333333")
    axis.plot([1, 103], [20.5, 20.5], color="0.7", lw=1, ls=":")
    draw_training(axis)
    draw_generation(axis)
    figure.patch.set_facecolor("white")  # the page behind may be dark
    write_whole_figure(path, figure)


def draw_training(axis):
    """Draw the upper part of the schematic."""
    draw_box(axis, (2, 36, 15, 9), "reference cells\ncounts x\ncell types k", DATA)
    draw_box(axis, (27, 36, 18, 9), "1  scGMVAE\nencoder of cells,\nmixture prior", NETWORK)
    draw_box(
        axis,
        (56, 36, 17, 9),
        "latent z of each cell\nK types × D dims:\nmean μₖ, variance σₖ²",
        LATENT,
    )
    draw_box(axis, (84, 36, 17, 9), "2  scDecoder\n(paper: genVAE)\nz → all genes (NB)", NETWORK)
    draw_box(axis, (2, 23.4, 15, 7.4), "pseudobulks of\ndrawn cells", DATA)
    draw_box(axis, (27, 23.4, 18, 7.4), "3  Bulk Encoder\ndeconvolution, network", NETWORK)
    draw_box(axis, (56, 23.4, 17, 7.4), "μ̂ₖ, σ̂ₖ² (K × D)\nproportions π̂ (K)", LATENT)
    draw_arrow(axis, (17.6, 40.5), (26.4, 40.5))
    draw_arrow(axis, (45.6, 40.5), (55.4, 40.5))
    draw_arrow(axis, (73.6, 40.5), (83.4, 40.5), "z paired with\nits own x", (78.5, 45.2))
    draw_arrow(axis, (9.5, 35.4), (9.5, 31.4), "Σ", (11.6, 33.4))
    draw_arrow(axis, (17.6, 27.1), (26.4, 27.1))
    draw_arrow(axis, (45.6, 27.1), (55.4, 27.1))
    draw_arrow(axis, (64.5, 35.4), (64.5, 31.4), "targets", (68.6, 33.4))


def draw_generation(axis):
    """Draw the lower part of the schematic."""
    draw_box(axis, (2, 3.5, 15, 9), "bulk RNA-seq\nof a sample", DATA)
    draw_box(axis, (27, 3.5, 18, 9), "3  Bulk Encoder\n(trained)", NETWORK)
    draw_box(axis, (56, 3.5, 17, 9), "k ~ π̂\nz ~ N(μ̂ₖ, σ̂ₖ²)", LATENT)
    draw_box(axis, (84, 3.5, 17, 9), "2  scDecoder\n(paper: genVAE)\n→ counts of a cell", NETWORK)
    draw_arrow(axis, (17.6, 8), (26.4, 8))
    draw_arrow(axis, (45.6, 8), (55.4, 8), "μ̂ₖ, σ̂ₖ², π̂", (50.5, 10))
    draw_arrow(axis, (73.6, 8), (83.4, 8), "z", (78.5, 10))


def draw_box(axis, place, text, color):
    """Draw a rounded box with a text. place: x, y, width, height."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    patch = FancyBboxPatch((x, y), width, height, "round,pad=0.4,rounding_size=1.4",
                           fc=color, ec="#333333", lw=1.3)  # fmt: skip
    axis.add_patch(patch)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5)


def draw_arrow(axis, start, end, text="", text_place=None):
    """Draw an arrow, with a text at ``text_place`` if it has one."""
    from matplotlib.patches import FancyArrowPatch

    style = {"arrowstyle": "-|>", "mutation_scale": 14, "lw": 1.4, "color": "#333333"}
    axis.add_patch(FancyArrowPatch(start, end, **style))
    if text:
        axis.text(*text_place, text, ha="center", va="center", fontsize=9, color="#333333")
