# Cell types from counts, by the ScType score (Ianevski, Giri and Aittokallio, Nature
# Communications 2022).
#
#     Rscript scType.R --data pbmc1k_v3
#     Rscript scType.R --data liver --db ScTypeDB_full.xlsx --tissue Liver --out liver
#
# Counts are normalised and clustered by Seurat (4 or 5). Each cell gets a score for each cell type
# of the tissue from its positive and negative markers; a cluster gets the type of the highest sum.
# Writes to --out: barcode_to_celltype.csv, which the trainings read, clusters.csv (the three best
# types of each cluster and their scores) and clusters.png (UMAP, clusters and cell types).
#
# The constants below are the defaults of the flags of the same name (--data, --db, ...).

DATA <- "pbmc1k_v3" # 10x folder (matrix.mtx, plain or .gz, both layouts) or 10x .h5
DB <- "tables/markers.csv" # marker table: csv, ScType's xlsx, or the address of one, downloaded once
TISSUE <- "Immune system" # one of the table's tissues
OUT <- "" # folder to write to; "" is where the data is, unless cell types are there already
RESOLUTION <- 0.8 # of the clustering; more gives more and smaller clusters
DIMS <- 10 # principal components that clustering and UMAP read
SEED <- 0

N_FEATURES <- 2000 # variable genes that the PCA reads
N_NEIGHBORS <- 20 # of each cell in the graph that is clustered
LABELS <- "barcode_to_celltype.csv"
# Colours of the cell types, those of plots/style.py: told apart by the colour-blind, too.
COLORS <- c(
  "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#4B1E00",
  "#000087", "#873C4B", "#0000FF", "#C3D2B4", "#5A87FF", "#003CB4", "#4B004B", "#B4D2FF"
)

# One line to stderr and exit status 1. Tests that source this file catch it as an error instead.
fail <- function(...) {
  stop(structure(
    class = c("input_error", "error", "condition"),
    list(message = paste0(...), call = NULL)
  ))
}

need <- function(package, what) {
  if (!nzchar(system.file(package = package))) { # without loading it, which takes seconds
    fail(
      "package ", package, " is missing, which ", what, " needs; install it by ",
      "Rscript -e 'install.packages(\"", package, "\")' or apt-get install r-cran-", tolower(package)
    )
  }
}

some <- function(names, limit = 3) {
  paste0(paste(head(names, limit), collapse = ", "), if (length(names) > limit) ", ...")
}

# Command line: --name value or --name=value for each of the constants.
parse_flags <- function(arguments) {
  settings <- list(
    data = DATA, db = DB, tissue = TISSUE, out = OUT, resolution = RESOLUTION, dims = DIMS,
    seed = SEED
  )
  usage <- paste0(
    "usage: Rscript scType.R [--flag value ...], the defaults being\n",
    paste0("  --", names(settings), " ", vapply(settings, deparse, ""), collapse = "\n"),
    "\nSee the top of scType.R for what they mean."
  )
  i <- 1
  while (i <= length(arguments)) {
    argument <- arguments[[i]]
    if (argument %in% c("-h", "--help")) {
      cat(usage, "\n", sep = "")
      return(NULL)
    }
    name <- sub("^--([^=]*).*", "\\1", argument)
    if (!startsWith(argument, "--") || !name %in% names(settings)) {
      fail(argument, ": no such flag, expected one of ", paste0("--", names(settings), collapse = " "))
    }
    if (grepl("=", argument, fixed = TRUE)) {
      value <- sub("^[^=]*=", "", argument)
    } else {
      i <- i + 1
      if (i > length(arguments)) fail("--", name, ": found no value after it, expected one")
      value <- arguments[[i]]
    }
    if (is.numeric(settings[[name]])) {
      number <- suppressWarnings(as.numeric(value))
      whole <- name %in% c("dims", "seed")
      if (is.na(number) || number < (name != "seed") * 1e-9 || (whole && number != round(number)) ||
        !is.finite(number) || number > .Machine$integer.max) {
        fail(
          "--", name, ": found ", value, ", expected a ", if (whole) "whole " else "", "number ",
          if (name == "seed") "of 0 or more" else "above 0"
        )
      }
      value <- number
    }
    settings[[name]] <- value
    i <- i + 1
  }
  settings
}

# ---------------------------------------------------------------------------- reading

# The first of some file names that is in a folder, plain or gzipped.
find_one <- function(folder, names) {
  for (name in names) {
    for (path in file.path(folder, paste0(name, c(".gz", "")))) {
      if (file.exists(path)) {
        return(path)
      }
    }
  }
  fail(folder, ": no ", paste(names, collapse = " or "), " (plain or .gz), expected a 10x folder")
}

# Evaluate an expression that reads a file; whatever goes wrong becomes one line that names it.
reading <- function(path, kind, expression) {
  tryCatch(suppressWarnings(expression),
    input_error = function(error) stop(error),
    error = function(error) {
      fail(path, ": not a readable ", kind, " (", strsplit(conditionMessage(error), "\n")[[1]][1], ")")
    }
  )
}

read_names <- function(path) {
  reading(path, "table", read.delim(
    path,
    header = FALSE, quote = "", comment.char = "", colClasses = "character"
  ))
}

# Raw counts of a 10x folder or .h5: a sparse matrix, genes x cells, gene symbols made unique.
read_counts <- function(path) {
  if (!file.exists(path)) {
    fail(path, ": no such file or folder, expected counts for --data (see README for PBMC 1K)")
  }
  if (!dir.exists(path)) {
    if (grepl("\\.h5ad$", path)) {
      fail(
        path, ": R reads no .h5ad; make a 10x folder of it: python annotate.py --data ", path,
        " --export folder"
      )
    }
    if (!grepl("\\.h5$", path)) fail(path, ": expected a 10x folder or a 10x .h5")
    need("hdf5r", "reading a .h5 file")
    counts <- reading(path, "10x .h5", Seurat::Read10X_h5(path))
    if (is.list(counts)) counts <- counts[["Gene Expression"]]
    symbols <- rownames(counts)
  } else {
    matrix_file <- find_one(path, "matrix.mtx")
    barcode_file <- find_one(path, "barcodes.tsv")
    feature_file <- find_one(path, c("features.tsv", "genes.tsv"))
    barcodes <- read_names(barcode_file)[[1]]
    features <- read_names(feature_file)
    counts <- reading(matrix_file, "Matrix Market file", Matrix::readMM(matrix_file))
    if (!identical(dim(counts), c(nrow(features), length(barcodes)))) {
      fail(
        matrix_file, ": found ", paste(dim(counts), collapse = " x "), ", expected ",
        nrow(features), " genes x ", length(barcodes), " barcodes"
      )
    }
    twice <- unique(barcodes[duplicated(barcodes)])
    if (length(twice)) {
      fail(
        path, ": ", length(twice), " barcodes occur more than once (", some(twice),
        "), expected one cell per barcode"
      )
    }
    colnames(counts) <- barcodes
    symbols <- features[[min(2, ncol(features))]]
    if (ncol(features) > 2 && any(features[[3]] != "Gene Expression")) {
      gene <- features[[3]] == "Gene Expression"
      cat(path, ": ", sum(!gene), " features that are not gene expression left out\n", sep = "")
      counts <- counts[gene, , drop = FALSE]
      symbols <- symbols[gene]
    }
  }
  counts <- methods::as(methods::as(counts, "generalMatrix"), "CsparseMatrix")
  values <- counts@x
  wrong <- !is.finite(values) | values < 0 | values != round(values)
  if (any(wrong)) {
    fail(
      path, ": found ", format(values[wrong][1]), " and ", sum(wrong) - 1, " other values that are ",
      "negative, fractional or not finite; expected raw counts, not normalised ones"
    )
  }
  # Seurat takes no underscores in names of genes.
  rownames(counts) <- make.unique(gsub("_", "-", symbols))
  empty <- Matrix::colSums(counts) == 0
  if (any(empty)) {
    cat(path, ": ", sum(empty), " cells without a single count left out\n", sep = "")
    counts <- counts[, !empty, drop = FALSE]
  }
  counts
}

# The file of the marker table; an address is downloaded once, into the current folder.
fetch <- function(db) {
  if (!grepl("^(https?|ftp|file)://", db)) {
    if (!file.exists(db)) fail(db, ": no such file, expected a marker table for --db")
    return(db)
  }
  kept <- basename(sub("[?#].*", "", db))
  if (!file.exists(kept)) {
    part <- paste0(".", kept, ".", Sys.getpid(), ".tmp")
    on.exit(unlink(part))
    status <- tryCatch(
      suppressWarnings(utils::download.file(db, part, mode = "wb", quiet = TRUE)),
      error = function(error) 1
    )
    if (status != 0 || !file.rename(part, kept)) fail(db, ": could not be downloaded for --db")
    cat(db, ": downloaded, kept as ", kept, "\n", sep = "")
  }
  kept
}

# Marker sets of a tissue: list(positive, negative), each a named list, cell type -> gene symbols.
read_markers <- function(db, tissue) {
  path <- fetch(db)
  if (grepl("\\.xlsx$", path, ignore.case = TRUE)) {
    need("openxlsx", "reading an .xlsx marker table")
    table <- reading(path, "Excel table", openxlsx::read.xlsx(path))
  } else {
    table <- reading(path, "table", utils::read.csv(path, colClasses = "character", encoding = "UTF-8"))
  }
  columns <- c("tissueType", "cellName", "geneSymbolmore1", "geneSymbolmore2")
  missing <- setdiff(columns, names(table))
  if (length(missing)) {
    fail(
      path, ": no column ", paste(missing, collapse = ", "), ", expected a marker table with ",
      paste(columns, collapse = ", ")
    )
  }
  table[is.na(table)] <- ""
  if (!tissue %in% table$tissueType) {
    known <- paste(sort(unique(table$tissueType)), collapse = ", ")
    fail("--tissue ", tissue, ": not in ", path, ", which knows ", known)
  }
  table <- table[table$tissueType == tissue, ]
  names <- trimws(table$cellName)
  split_genes <- function(text) {
    genes <- lapply(strsplit(text, ","), function(genes) {
      correct_symbols(toupper(gsub("\\s", "", genes)))
    })
    # Rows of one cell type are joined.
    lapply(split(genes, factor(names, unique(names))), function(sets) {
      setdiff(unique(unlist(sets)), c("", "NA"))
    })
  }
  list(positive = split_genes(table$geneSymbolmore1), negative = split_genes(table$geneSymbolmore2))
}

# Approved symbols in place of aliases, by HGNChelper where it is installed; else as they are.
correct_symbols <- function(genes) {
  genes <- genes[nzchar(genes)]
  if (!length(genes) || !requireNamespace("HGNChelper", quietly = TRUE)) {
    return(genes)
  }
  approved <- suppressMessages(suppressWarnings(HGNChelper::checkGeneSymbols(genes)$Suggested.Symbol))
  # "A /// B": the alias of several genes. What it cannot tell stays as it is.
  toupper(unlist(strsplit(ifelse(is.na(approved), genes, approved), " /// ", fixed = TRUE)))
}

# ---------------------------------------------------------------------------- the score

# ScType scores, types x cells.
#
#   score_kc = sum_{g in P_k} s_g z_gc / sqrt(|P_k|) - sum_{g in N_k} s_g z_gc / sqrt(|N_k|)
#   s_g = 1 - (n_g - 1) / (K - 1)
#
# z: expression of each gene scaled to mean 0 and variance 1 over all cells (genes x cells, named by
# gene). P_k, N_k: positive and negative markers of type k that the data has. n_g: how many types
# have gene g as a positive marker; a gene that is only ever negative has s_g = 1. All types at once
# are one matrix product.
sctype_scores <- function(z, markers) {
  n_types <- length(markers$positive)
  counts <- table(unlist(markers$positive))
  sensitivity <- 1 - (counts - 1) / max(n_types - 1, 1)
  genes <- toupper(rownames(z))
  weight <- as.numeric(sensitivity[genes])
  weight[is.na(weight)] <- 1
  weights <- function(sets) {
    member <- vapply(sets, function(set) as.numeric(genes %in% set), numeric(length(genes)))
    member <- matrix(member, nrow = length(genes)) # vapply drops a dimension of one gene
    t(member * weight) / pmax(sqrt(colSums(member)), 1)
  }
  scores <- (weights(markers$positive) - weights(markers$negative)) %*% as.matrix(z)
  dimnames(scores) <- list(names(markers$positive), colnames(z))
  scores
}

# Sums of the scores over each cluster: types x clusters.
cluster_scores <- function(scores, clusters) {
  t(rowsum(t(scores), clusters))
}

# The three best types of each cluster, and the name it gets: the best one, or Unknown if its score
# is under a quarter of the number of cells.
name_clusters <- function(sums, n_cells) {
  rows <- lapply(colnames(sums), function(cluster) {
    best <- order(-sums[, cluster])[seq_len(min(3, nrow(sums)))]
    unknown <- sums[best[1], cluster] < n_cells[[cluster]] / 4
    data.frame(
      cluster = cluster, cells = n_cells[[cluster]],
      cell_type = if (unknown) "Unknown" else rownames(sums)[best[1]],
      rank = seq_along(best), candidate = rownames(sums)[best], score = round(sums[best, cluster], 3)
    )
  })
  do.call(rbind, c(rows, make.row.names = FALSE))
}

# A layer of a Seurat object: by LayerData where SeuratObject has it (5 and later, whose assays have
# no slots of these names), else by GetAssayData's slot.
layer_of <- function(object, name, api = asNamespace("SeuratObject")) {
  if (is.function(api[["LayerData"]])) {
    api[["LayerData"]](object, layer = name)
  } else {
    api[["GetAssayData"]](object, slot = name)
  }
}

# Seurat's usual way from counts to clusters; expression of the variable genes and the markers is
# scaled, the others are not needed.
cluster_cells <- function(counts, markers, settings) {
  object <- Seurat::CreateSeuratObject(counts)
  object <- Seurat::NormalizeData(object, verbose = FALSE)
  object <- Seurat::FindVariableFeatures(object, nfeatures = N_FEATURES, verbose = FALSE)
  wanted <- rownames(object)[toupper(rownames(object)) %in% unlist(markers)]
  features <- union(Seurat::VariableFeatures(object), wanted)
  object <- Seurat::ScaleData(object, features = features, verbose = FALSE)
  n_pcs <- min(max(50, settings$dims), ncol(object) - 1, length(Seurat::VariableFeatures(object)) - 1)
  if (n_pcs < settings$dims) {
    fail(
      "--dims: found ", settings$dims, ", expected at most ", max(n_pcs, 0), " for ",
      ncol(object), " cells"
    )
  }
  dims <- seq_len(settings$dims)
  # Few cells make the approximate SVD warn, and Seurat 5 refuse; the exact one is as fast there.
  object <- suppressWarnings(Seurat::RunPCA(
    object,
    npcs = n_pcs, approx = n_pcs < ncol(object) / 3, seed.use = settings$seed, verbose = FALSE
  ))
  neighbors <- min(N_NEIGHBORS, ncol(object) - 1)
  object <- Seurat::FindNeighbors(object, dims = dims, k.param = neighbors, verbose = FALSE)
  object <- Seurat::FindClusters(
    object,
    resolution = settings$resolution, random.seed = settings$seed, verbose = FALSE
  )
  object <- suppressWarnings(Seurat::RunUMAP(
    object,
    dims = dims, n.neighbors = min(30, neighbors), umap.method = "uwot",
    seed.use = settings$seed, verbose = FALSE
  ))
  list(object = object, z = layer_of(object, "scale.data")[wanted, , drop = FALSE])
}

# ---------------------------------------------------------------------------- writing

# Write a file whole or not at all.
write_whole <- function(path, write) {
  part <- file.path(dirname(path), paste0(".", Sys.getpid(), ".tmp.", basename(path)))
  on.exit(unlink(part))
  tryCatch(write(part), error = function(error) {
    fail(path, ": could not be written (", conditionMessage(error), ")")
  })
  if (!file.rename(part, path)) fail(path, ": could not be written")
}

draw_clusters <- function(path, object, cell_type) {
  at <- as.data.frame(Seurat::Embeddings(object, "umap"))
  names(at) <- c("UMAP1", "UMAP2")
  clusters <- Seurat::Idents(object)
  at$cell_type <- factor(cell_type, c(sort(setdiff(unique(cell_type), "Unknown")), "Unknown"))
  colors <- rep_len(COLORS, nlevels(at$cell_type) - 1)
  centers <- stats::aggregate(at[, 1:2], list(cluster = clusters), stats::median)
  picture <- ggplot2::ggplot(at, ggplot2::aes(UMAP1, UMAP2)) +
    ggplot2::geom_point(ggplot2::aes(color = cell_type), size = 0.8) +
    ggplot2::geom_label(data = centers, ggplot2::aes(label = cluster), size = 3, alpha = 0.7) +
    ggplot2::scale_color_manual(values = c(colors, "#CCCCCC"), name = NULL, drop = FALSE) +
    ggplot2::guides(color = ggplot2::guide_legend(override.aes = list(size = 3))) +
    ggplot2::labs(title = "Cell types by ScType; numbers are clusters") +
    ggplot2::theme_classic()
  suppressMessages(ggplot2::ggsave(path, picture, width = 8, height = 5, dpi = 150, device = "png"))
}

main <- function(arguments) {
  settings <- parse_flags(arguments)
  if (is.null(settings)) {
    return(invisible())
  }
  need("Seurat", "scType.R")
  need("ggplot2", "the picture")
  beside <- if (dir.exists(settings$data)) settings$data else dirname(settings$data)
  out <- if (nzchar(settings$out)) settings$out else beside
  if (!nzchar(settings$out) && file.exists(file.path(out, LABELS))) {
    fail(
      file.path(out, LABELS), ": cell types are there already; name the folder with --out to ",
      "write over them"
    )
  }
  markers <- read_markers(settings$db, settings$tissue) # before the data: it is quick
  counts <- read_counts(settings$data)
  cat(settings$data, ": ", ncol(counts), " cells x ", nrow(counts), " genes\n", sep = "")
  wanted <- unique(unlist(markers))
  found <- intersect(wanted, toupper(rownames(counts)))
  if (!length(found)) {
    fail(
      settings$db, ": none of its ", length(wanted), " markers (", some(wanted),
      ") is a gene of the data (", some(rownames(counts)), ")"
    )
  }
  cat(
    settings$db, ": ", length(markers$positive), " cell types of ", settings$tissue, "; ",
    length(found), " of ", length(wanted), " markers are genes of the data",
    if (!requireNamespace("HGNChelper", quietly = TRUE)) {
      " (HGNChelper is not installed: aliases such as CD20 are not looked up)"
    },
    "\n",
    sep = ""
  )
  set.seed(settings$seed)
  clustered <- tryCatch(cluster_cells(counts, markers, settings),
    input_error = function(error) stop(error),
    error = function(error) {
      line <- strsplit(conditionMessage(error), "\n")[[1]][1]
      fail(settings$data, ": ", ncol(counts), " cells could not be clustered (", line, ")")
    }
  )
  clusters <- as.character(Seurat::Idents(clustered$object))
  sums <- cluster_scores(sctype_scores(clustered$z, markers), clusters)
  named <- name_clusters(sums[, order(as.numeric(colnames(sums))), drop = FALSE], table(clusters))
  best <- named[named$rank == 1, ]
  cell_type <- best$cell_type[match(clusters, best$cluster)]

  if (!dir.exists(out) && !dir.create(out, recursive = TRUE, showWarnings = FALSE)) {
    fail("--out ", out, ": could not be made")
  }
  labels <- data.frame(barcode = colnames(counts), cell_type = cell_type)
  write_table <- function(table, name, quote) {
    write_whole(file.path(out, name), function(path) {
      utils::write.csv(table, path, row.names = FALSE, quote = quote, fileEncoding = "UTF-8")
    })
  }
  write_table(labels, LABELS, any(grepl("[,\"]", unlist(labels))))
  write_table(named, "clusters.csv", TRUE)
  write_whole(file.path(out, "clusters.png"), function(path) draw_clusters(path, clustered$object, cell_type))
  print(best[, c("cluster", "cells", "cell_type", "score")], row.names = FALSE)
  unknown <- sum(cell_type == "Unknown")
  cat(
    "wrote ", LABELS, ", clusters.csv and clusters.png to ", out, ": ",
    length(unique(setdiff(cell_type, "Unknown"))), " cell types, ", unknown, " of ",
    length(cell_type), " cells Unknown\n",
    sep = ""
  )
}

if (sys.nframe() == 0L) {
  tryCatch(main(commandArgs(trailingOnly = TRUE)), error = function(error) {
    message("error: ", conditionMessage(error))
    quit(status = 1)
  })
}
