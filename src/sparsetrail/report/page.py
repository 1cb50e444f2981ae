"""placeholder"""
from pathlib import Path
from sparsetrail.core import Report
from sparsetrail.report import io
from sparsetrail.report.tables import table


def write(report: Report, out: str | Path, *, images=None) -> dict[str, Path]:
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    return {
        "json": io.replace(out / io.RESULT, io.to_json(report)),
        "markdown": io.replace(out / "report.md", (f"# {report.title}\n\n" + table(report)).encode()),
        "csv": io.replace(out / "trail.csv", io.trail_csv(report).encode()),
    }
