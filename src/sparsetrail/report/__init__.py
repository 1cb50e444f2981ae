"""Reports: plain data in, a folder with JSON, Markdown, CSV and one page that opens offline out."""

from sparsetrail.report.card import cards as cards
from sparsetrail.report.charts import figure as figure
from sparsetrail.report.charts import figures as figures
from sparsetrail.report.comparison import compare as compare
from sparsetrail.report.io import ReportError as ReportError
from sparsetrail.report.io import from_json as from_json
from sparsetrail.report.io import load as load
from sparsetrail.report.io import pack as pack
from sparsetrail.report.io import to_json as to_json
from sparsetrail.report.io import unpack as unpack
from sparsetrail.report.page import write as write
from sparsetrail.report.published import claims as claims
from sparsetrail.report.tables import table as table
from sparsetrail.report.terminal import console as console
from sparsetrail.report.terminal import show_audits as show_audits
from sparsetrail.report.terminal import text_tables as text_tables
