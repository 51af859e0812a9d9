"""The morning report: one record of the night, shown in the terminal, as a page, as pictures and as tables.

    rich.print(terminal(record))
    path.write_text(html(record))

What a record holds is written down in `record.py`. No report ever shows a text of the data.
"""

from overnight.report.markdown import decision_markdown, night_markdown, trials_rows, validation_rows
from overnight.report.page import html, write_report
from overnight.report.pictures import confusion_matrix_png
from overnight.report.record import NightRecord
from overnight.report.registered import model_markdown, version_markdown
from overnight.report.terminal import terminal

__all__ = [
    "NightRecord",
    "confusion_matrix_png",
    "decision_markdown",
    "html",
    "model_markdown",
    "night_markdown",
    "terminal",
    "trials_rows",
    "validation_rows",
    "version_markdown",
    "write_report",
]
