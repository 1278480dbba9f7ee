"""The samples of a table of bulks: proportions, fit, and the expression of their cell types.

Notation in shape comments: S bulk samples, G genes, K cell types, D latent dimensions.
"""

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from deconvolution.encode import encode_samples
from deconvolution.expression import (
    SampleProfiles,
    estimate_expression,
    expected_bulk,
    write_expression,
)
from deconvolution.fit import MIN_COUNTS, bulk_fit, counts_of_genes, misfit, sum_agreement
from deconvolution.proportions import make_proportions, normal_interval
from deconvolution.unknown import unknown_share


def sample_proportions(names, cell_types, encoded, known=None):
    """Proportions of bulk samples: what the encoder answers, its error, and what is known.

    Args:
        names: (S). cell_types: (K). encoded: EncodedSamples. known: see
            :func:`~deconvolution.proportions.make_proportions`.
    """
    pi, sd = (part.cpu().numpy().astype(np.float64) for part in (encoded.cells, encoded.sd))
    interval = normal_interval(pi, sd)
    return make_proportions(names, cell_types, pi, encoded.content, interval, known)


def add_to_sums(sums, counts, sample):
    """Add counts (B x G), CSR, of the cells of bulks ``sample`` (B) to the sums of bulks (S, G)."""
    bulks, member = np.unique(sample, return_inverse=True)
    shape = (len(bulks), len(sample))
    one_hot = sp.csr_matrix((np.ones(len(sample)), (member, np.arange(len(sample)))), shape)
    sums[bulks] += (one_hot @ counts).toarray()


class BulkSamples:
    """Bulk samples, encoded, and how the reference's cell types add up to them.

    Attributes:
        bulk: Bulk (S). values: the same as an array (S, G). model: Model. proportions: Proportions
            of the samples, estimated or known. encoded: mu, var (S, K, D) and pi (S, K), the
            proportions of cells. mixed: the same, with proportions at which the reference's cells
            make the bulk's RNA. weight: how much of the bulk a cell stands for (S, K). profiles:
            SampleProfiles (S, K, G). expected: (S, G), the sum that these make. unknown:
            UnknownShare. fit: a row for each sample. is_shallow: mask (S) of counts too few for the
            fit to say anything. sums: (S, G), of the cells generated so far, by their weights.
            calibration: ``(calibrate, platform)``, and expression: Expression by these; None before
            :meth:`estimate_expression`.
    """

    calibration = expression = None

    def __init__(self, bulk, model, mrna_content="auto", known=None):
        """Args:
        bulk: Bulk in all genes of the model: those that the encoder does not read still show the
            fit. mrna_content: see :func:`~deconvolution.encode.choose_content`. known:
            readers.proportions.KnownProportions, in place of what the encoder answers.
        """
        self.bulk, self.values, self.model = bulk, bulk.dense(), model
        read = np.isin(model.encoder_genes, np.array(model.genes)[bulk.measured])
        print(f"{bulk.where}: {read.sum():,} of the {len(read):,} genes the Bulk Encoder reads")
        self.encode(encode_samples(model, bulk, mrna_content), known)
        self.expected = expected_bulk(model.decoder, self.mixing, self.profiles)
        self.sums = np.zeros(self.values.shape)
        own = self.profiles.reference[0]  # (K, G), of no state
        self.unknown = unknown_share(self.values, bulk.measured, own, model.genes)
        counts = counts_of_genes(self.values, self.expected, bulk.measured)
        self.is_shallow = counts < MIN_COUNTS
        self.fit = self.measure_fit()

    names = property(lambda self: self.bulk.samples, doc="Of the samples (S).")

    def __repr__(self):
        n_types, n_genes = len(self.model.cell_types), self.bulk.measured.sum()
        return f"{self.bulk!r} of {n_types} cell types, {n_genes:,} genes"

    def encode(self, encoded, known):
        """Take proportions and moments from EncodedSamples, and known proportions where given."""
        names, cell_types = self.names, self.model.cell_types
        self.proportions = sample_proportions(names, cell_types, encoded, known)
        cells = torch.from_numpy(self.proportions.cells).to(encoded.cells)
        mixing = encoded.mixing(cells)
        # A cell stands for as much of the bulk as the mRNA of its type, whatever its counts.
        self.weight = (mixing / cells.clamp(min=1e-12)).cpu().numpy()  # (S, K)
        self.encoded, self.mixing = [encoded.mu, encoded.var, cells], mixing
        self.states, share = encoded.states, None
        if self.states is not None:
            share = self.states.share
            parts = torch.from_numpy(self.model.states.mix(share)).to(cells)  # (S, K, C)
            self.encoded = [*self.model.decoder.moments_of_weights(parts), cells, parts]
        self.profiles = SampleProfiles(self.model, len(names), share)

    def measure_fit(self):
        """DataFrame (S rows): how the cell types add up to each sample, and what they lack."""
        correlation, unexplained = bulk_fit(self.values, self.expected, self.bulk.measured)
        usual = self.model.encoder_metadata.get("fit")
        far = misfit(correlation, unexplained, usual) if usual else np.nan
        columns = {"correlation": correlation, "unexplained": unexplained, "misfit": far}
        columns["unknown"] = self.unknown.share
        columns |= {"unknown_low": self.unknown.low, "unknown_high": self.unknown.high}
        if self.states is not None and self.model.states.states.baseline:
            share = self.states.by_condition()
            values = (share, *normal_interval(share, self.states.sd))
            for i, name in enumerate(self.states.names):
                for end, value in zip(("", "_low", "_high"), values, strict=True):
                    columns[f"state {name}{end}"] = value[:, i]
        return pd.DataFrame(columns, index=self.names)

    def add(self, cells, balanced=False):
        """Add generated Cells to the sums of their samples; balanced: as many of each type."""
        weight = self.weight[cells.bulk, cells.cell_type]
        if balanced:
            weight = weight * self.proportions.cells[cells.bulk, cells.cell_type]
        add_to_sums(self.sums, sp.diags_array(weight) @ cells.counts, cells.bulk)

    def compare_sums(self):
        """Add to ``fit`` how well the generated cells of each sample add up to it."""
        self.fit["agreement"] = sum_agreement(self.values, self.sums, self.bulk.measured)

    def estimate_expression(self, calibrate, platform):
        """Set :attr:`expression` by :func:`~deconvolution.expression.estimate_expression`."""
        self.calibration = calibrate, platform
        given = self.mixing, self.values, self.bulk.measured, self.profiles
        self.expression = estimate_expression(self.model.decoder, *given, *self.calibration)

    def write_expression(self, path):
        """:func:`~deconvolution.expression.write_expression` of these samples, into an .h5ad."""
        cells, metadata = self.proportions.cells, self.model.metadata
        write_expression(path, self.names, cells, self.expression, metadata)
