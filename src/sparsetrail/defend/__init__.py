"""Defences that act on training, each a function of its settings that returns `Seams` for the one loop.

    pgd_at    adversarial training. Madry et al. 2018, arXiv:1706.06083
    trades    clean loss and a divergence from it. Zhang et al. 2019, arXiv:1901.08573
    snn_rat   adversarial training and an orthogonal retraction of the weights. Ding et al. 2022 (NeurIPS), SNN-RAT
    hire_snn  noise crafted from one period of the time steps to the next. Kundu et al. 2021, arXiv:2110.11417
    sr        sparse-gradient regularisation. Liu et al. 2024, arXiv:2405.20355
    mppd      the same membrane for clean and perturbed input. Ding et al. 2024 (ICML), MS-MPPD
    tg_reg    small sums of the input gradient of every step, TG-Reg (2026)

What a source leaves open is a named setting with a default; what cannot be set is told in docs/reproduce.md. Points are
crafted in eval mode on a frozen twin of the network before the batch itself moves BatchNorm statistics, which stay as
they are meanwhile, and the last point is trained on. Switched off (pgd_at, snn_rat: eps and strength 0; trades: beta 0;
sr, tg_reg: weight and eps 0; mppd: eps and rho 0; hire_snn: one period) a defence has no seam, and the loop is plain
training to the bit. Radii are L-infinity in pixels 0..1.
"""

from collections.abc import Callable

from sparsetrail.defend.hire_snn import hire_snn
from sparsetrail.defend.mppd import mppd
from sparsetrail.defend.pgd_at import pgd_at
from sparsetrail.defend.snn_rat import snn_rat
from sparsetrail.defend.sr import sr
from sparsetrail.defend.tg_reg import tg_reg
from sparsetrail.defend.trades import trades
from sparsetrail.training import Seams

DEFENCES: dict[str, Callable[..., Seams]] = {
    "pgd_at": pgd_at, "trades": trades, "snn_rat": snn_rat, "hire_snn": hire_snn, "sr": sr, "mppd": mppd,
    "tg_reg": tg_reg,
}  # fmt: skip
