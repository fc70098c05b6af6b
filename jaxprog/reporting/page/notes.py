"""The section of what a reader must know beside the figures."""

from collections.abc import Mapping
from typing import Any

from jaxprog.monitoring import incidents as incidents_lib
from jaxprog.reporting import facts
from jaxprog.reporting.page import markup
from jaxprog.reporting.page.markup import Html, join, tag
from jaxprog.reporting.rundir import RunFiles

# Incidents that a page lists; the log has them all.
_MAX_INCIDENTS = 60


def notes(run: RunFiles) -> Html:
  """Returns what a reader must know beside the figures, and the incidents."""
  found = facts.notes(run.stages, run.planned)
  parts = [
    tag('ul', *(tag('li', x) for x in found), class_='notes')
    if found
    else tag('p', 'Nothing to note.')
  ]
  parts.append(tag('h3', 'Incidents'))
  if not run.incidents:
    return join(*parts, tag('p', 'None were recorded.'))
  summaries = incidents_lib.summarise(run.incidents)
  parts.append(tag('ul', *(tag('li', x) for x in summaries), class_='notes'))
  shown = list(run.incidents)[-_MAX_INCIDENTS:]
  fields = 'time', 'kind', 'stage', 'step', 'message'
  parts.append(
    markup.table(
      list(fields),
      [[_cell(incident, field) for field in fields] for incident in shown],
      caption=f'The last {len(shown)} of {len(run.incidents):,}; '
      'incidents.jsonl has all of them',
      left=(0, 1, 2, 4),
    )
  )
  return join(*parts)


def _cell(incident: Mapping[str, Any], field: str) -> object:
  value = incident.get(field)
  if value is None:
    return '–'
  if field == 'message':
    return tag('span', value, class_='long')
  return f'{value:,}' if isinstance(value, int) else value
