"""The section of what a reader must know beside the figures."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.reporting import facts
from jaxprog.reporting.page import markup
from jaxprog.reporting.parts import Heading, Part
from jaxprog.reporting.rundir import RunFiles

# Incidents that a page lists; the log has them all.
_MAX_INCIDENTS = 60
_FIELDS = ('time', 'kind', 'stage', 'step', 'message')


def notes(run: RunFiles) -> Iterator[Part]:
  """Yields notes and incidents; the page has a table of the last of these."""
  yield facts.notes(run) or 'Nothing to note.'
  yield Heading('Incidents')
  if not run.incidents:
    yield 'None were recorded.'
    return
  yield incidents_lib.summarise(run.incidents)
  shown = run.incidents[-_MAX_INCIDENTS:]
  yield markup.table(
    _FIELDS,
    [[_cell(incident, field) for field in _FIELDS] for incident in shown],
    caption=f'The last {len(shown)} of {len(run.incidents):,}; '
    'incidents.jsonl has all of them',
    left=(0, 1, 2, 4),
  )


def _cell(incident: Mapping[str, Any], field: str) -> object:
  value = incident.get(field)
  if value is None:
    return '–'
  return f'{value:,}' if isinstance(value, int) else value
