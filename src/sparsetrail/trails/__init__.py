"""The sparsity trail: for every operation, the zeros in and the norm of the gradient with respect to its input.

The paper's Figures 1 and 3 (arXiv:2509.23762, sec. 4.3), and where the zeros come from: which of them an operation
creates and which it passes on. The gradient of the cross-entropy with respect to the input of an operation *through
that operation* is read by a tensor hook on an alias of the input, so in-place adds after it do no harm; the gradient
that arrives at its output by a hook on that. Counts are taken as the backward passes and no gradient is kept. Zeros are
exact zeros. docs/trail.md defines every number.
"""

from sparsetrail.trails.geometry import density_cap as density_cap
from sparsetrail.trails.geometry import kind_of as kind_of
from sparsetrail.trails.geometry import maxpool_density_cap as maxpool_density_cap
from sparsetrail.trails.geometry import reach as reach
from sparsetrail.trails.geometry import strided_conv_density as strided_conv_density
from sparsetrail.trails.run import Detail as Detail
from sparsetrail.trails.run import trail as trail
