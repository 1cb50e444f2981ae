"""The charts, one Vega-Lite specification each: interactive on the page, vector graphics in a paper."""

from sparsetrail.report.charts.ablation import ablation_spec as ablation_spec
from sparsetrail.report.charts.accuracy import accuracy_spec as accuracy_spec
from sparsetrail.report.charts.audit import audit_specs as audit_specs
from sparsetrail.report.charts.figure import Which as Which
from sparsetrail.report.charts.figure import figure as figure
from sparsetrail.report.charts.figure import figures as figures
from sparsetrail.report.charts.look import Spec as Spec
from sparsetrail.report.charts.look import config as config
from sparsetrail.report.charts.look import stamp as stamp
from sparsetrail.report.charts.look import stamped as stamped
from sparsetrail.report.charts.tradeoff import tradeoff_spec as tradeoff_spec
from sparsetrail.report.charts.trail import examples_spec as examples_spec
from sparsetrail.report.charts.trail import steps_spec as steps_spec
from sparsetrail.report.charts.trail import traced as traced
from sparsetrail.report.charts.trail import trail_spec as trail_spec
