"""The sections of a run's reports, in their order.

The text and the page are made of this list; a part that one of them cannot
show is left out there. A short section may stand here.
"""

from jaxprog.reporting.page import (
  classes,
  curves,
  hand_over,
  notes,
  overview,
  planned,
  scorecard,
  time,
)
from jaxprog.reporting.parts import Section

SECTIONS = (
  Section('overview', 'Overview', overview.overview),
  Section('scorecard', 'Scorecard', scorecard.scorecard),
  Section('curves', 'Curves', curves.curves),
  Section('hand-over', 'Hand-over', hand_over.hand_over),
  Section('time', 'Time', time.time),
  Section('plan', 'Planned elsewhere', planned.planned),
  Section('classes', 'Classes and mistakes', classes.classes),
  Section('notes', 'Notes and incidents', notes.notes),
)
