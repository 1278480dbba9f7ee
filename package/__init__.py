"""bulk2sc: single cells from bulk RNA-seq.

from bulk2sc.api import deconvolve, generate, load
"""

from bulk2sc.runtime import version

__version__ = version.VERSION
